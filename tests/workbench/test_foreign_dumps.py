"""States of other programs: named by rules and by what they equal, and what they are confused with is said."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench import Trace, TraceError
from workbench.cli.main import main
from workbench.comparison.foreign_dumps import import_states, read_rules, read_states
from workbench.comparison.identify import identify


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def prompt():
    return random_prompt(0, 30)


@pytest.fixture(scope="module")
def states(llama, prompt):
    """What the Numba engine computes, by tap."""
    with workbench.open_engine("numba", llama) as engine:
        return dict(engine.trace(prompt, ["embed", "layers.*", "layers.*.*", "norm", "logits"]))


def what(llama, prompt, state, **options):
    (found,) = identify(llama, prompt, {"x": state}, **options)
    return found


def test_every_tap_is_recognised(llama, prompt, states):
    found = identify(llama, prompt, {f"tensor_{number}": state for number, state in enumerate(states.values())})
    assert [each.tap for each in found] == list(states)


def test_what_taps_are_confused_with_is_named(llama, prompt, states):
    layer = states["embed"] + states["layers.0.attention"]
    assert "embed plus layers.0.attention: the residual stream between" in what(llama, prompt, layer).what
    added = states["layers.1.attention"] + states["layers.1.mlp"]
    assert "what layer 1 adds, without the residual stream" in what(llama, prompt, added).what
    own = llama.token_rows(list(prompt.lookup_ids))
    assert "without the injected rows" in what(llama, prompt.replace(input_ids=prompt.lookup_ids), own).what
    late = torch.cat([states["layers.1"][:1], states["layers.1"][:-1]])
    assert what(llama, prompt, late).what == "layers.1, 1 token too late"
    assert what(llama, prompt, states["norm"].flip(0)).what == "norm, in reverse order"
    assert what(llama, prompt, states["layers.0"] * 3).what == "layers.0, times 3"
    noise = torch.randn_like(states["embed"])
    assert what(llama, prompt, noise).what.startswith("nothing known; ")
    assert "nothing known has its width 7" in what(llama, prompt, noise[:, :7]).what
    for found in (late, noise):
        assert what(llama, prompt, found).tap is None


def test_states_in_bfloat16_are_recognised_with_its_rounding(llama, prompt):
    with workbench.open_engine("numba", llama, dtype="bfloat16") as engine:
        state = engine.trace(prompt, ["layers.1"])["layers.1"]
    assert what(llama, prompt, state, dtype="bfloat16").tap == "layers.1"
    assert what(llama, prompt, state, dtype="float32").tap is None


def test_hidden_states_of_transformers_become_a_trace_that_compares(llama, tmp_path, capsys):
    prompt = workbench.Prompt(range(5, 25))
    network = AutoModelForCausalLM.from_pretrained(llama.path, dtype=torch.float32)
    with torch.no_grad():
        given = network(torch.tensor([list(prompt.input_ids)]), output_hidden_states=True)
    torch.save({"hidden_states": given.hidden_states, "logits": given.logits}, tmp_path / "dump.pt")
    prompt.save(tmp_path / "prompt.json")
    arguments = [
        str(tmp_path / "dump.pt"),
        "--prompt",
        str(tmp_path / "prompt.json"),
        "--model",
        str(llama.path),
        "--dtype",
        "float32",
    ]
    assert main(["import", *arguments]) == 0
    layers = llama.text_config.num_hidden_layers
    printed = capsys.readouterr().out
    assert "hidden_states.0: embed" in printed
    assert f"hidden_states.{layers}: norm" in printed
    assert main(["import", *arguments, "--engine", "mine", "--out", str(tmp_path / "run.safetensors")]) == 0
    trace = Trace.load(tmp_path / "run.safetensors")
    assert list(trace) == ["embed", *(f"layers.{number}" for number in range(layers - 1)), "norm", "logits"]
    assert trace.provenance["engine"] == "mine"
    reference = str(tmp_path / "reference.safetensors")
    assert (
        main(
            [
                "trace",
                str(tmp_path / "prompt.json"),
                "--model",
                str(llama.path),
                "--reference",
                "float32",
                "--out",
                reference,
            ]
        )
        == 0
    )
    assert main(["compare", reference, str(tmp_path / "run.safetensors")]) == 0
    assert "same" in capsys.readouterr().out


def test_rules_name_states_and_the_reference_confirms_them(llama, prompt, states, tmp_path):
    dump = {f"block_{number}": states[f"layers.{number}"] for number in range(2)}
    lens = {
        "blocks.0.hook_resid_post": states["layers.0"],
        "blocks.1.hook_mlp_out": states["layers.1.mlp"],
        "hook_embed": states["embed"],
    }
    trace, _ = import_states(llama, prompt, lens, dtype="float32")
    assert list(trace) == ["embed", "layers.0", "layers.1.mlp"]
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({r"block_(\d+)": "layers.{1}"}))
    trace, _ = import_states(llama, prompt, dump, dtype="float32", rules=read_rules(path))
    assert list(trace) == ["layers.0", "layers.1"]
    swapped = {"block_0": dump["block_1"]}
    with pytest.raises(TraceError, match=r"block_0 is named like layers.0 and equals layers.1"):
        import_states(llama, prompt, swapped, dtype="float32", rules=read_rules(path))
    between = {"blocks.0.hook_resid_post": states["embed"] + states["layers.0.attention"]}
    with pytest.raises(TraceError, match="the residual stream between attention and MLP"):
        import_states(llama, prompt, between, dtype="float32")
    wrong = {
        "blocks.1.hook_resid_post": states["layers.1"] * 1.5
    }  # a fault of the engine stays: it is for `compare` to find
    assert list(import_states(llama, prompt, wrong, dtype="float32")[0]) == ["layers.1"]


def test_files_of_several_formats_are_read(states, tmp_path):
    kept = states["layers.0"]
    save_file({"a": kept[None].contiguous()}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", b=kept.numpy(), ids=np.arange(3))
    np.save(tmp_path / "c.npy", kept.numpy())
    torch.save([kept, kept], tmp_path / "d.pt")
    save_file({"hidden_states": torch.stack([kept, kept * 2], dim=1)}, tmp_path / "e.safetensors")
    (tmp_path / "notes.txt").write_text("not a tensor")
    found = read_states(tmp_path)
    assert sorted(found) == ["a", "b", "c", "d.0", "d.1", "hidden_states.0", "hidden_states.1"]
    torch.save({"step": {"x": kept}, "other": {"x": kept}}, tmp_path / "f.pt")
    assert sorted(read_states(tmp_path / "f.pt")) == ["other.x", "step.x"]
    save_file({"a": kept.contiguous()}, tmp_path / "g.safetensors")
    with pytest.raises(TraceError, match=r"a is in .* twice, the second time in g.safetensors"):
        read_states(tmp_path)
    assert all(torch.equal(state, kept) for name, state in found.items() if name != "hidden_states.1")


class Malicious:
    def __reduce__(self):
        return print, ("code ran",)


def test_files_that_run_code_or_are_damaged_are_refused(tmp_path, capsys):
    torch.save(Malicious(), tmp_path / "evil.pt")
    np.save(tmp_path / "evil.npy", np.array([Malicious()], dtype=object), allow_pickle=True)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "other.bin").write_bytes(b"abc")
    np.save(tmp_path / "ids.npy", np.arange(4))
    for name, words in (
        ("evil.pt", "can run any code"),
        ("evil.npy", "is not a file of plain arrays"),
        ("cut.safetensors", "is not a safetensors file"),
        ("empty.npz", "is not a file of plain arrays"),
        ("other.bin", "is none of .safetensors"),
        ("ids.npy", "has no floating-point tensors"),
    ):
        with pytest.raises(TraceError, match=words):
            read_states(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out
    (tmp_path / "rules.json").write_text('{"(": "embed"}')
    with pytest.raises(TraceError, match="is not a file of rules"):
        read_rules(tmp_path / "rules.json")


def test_states_of_another_prompt_are_refused(llama, prompt, states):
    with pytest.raises(TraceError, match="no state has a row for each of the prompt's 30 tokens"):
        import_states(llama, prompt, {"a": states["embed"][:-1]}, dtype="float32")
    with pytest.raises(TraceError, match="contains NaN or infinity"):
        identify(llama, prompt, {"a": states["embed"] * torch.nan})
    with pytest.raises(TraceError, match="two states are embed"):
        import_states(llama, prompt, {"a": states["embed"], "b": states["embed"]}, dtype="float32")
    for given, words in (
        ({}, "no states were given"),
        ({"layer": states["embed"]}, "'layer' is not a tap"),
        ({"embed": states["embed"][:, :3]}, r"embed is \[30, 3\]"),
    ):
        with pytest.raises(TraceError, match=words):
            Trace.from_tensors(given, prompt, llama, dtype="float32")
    with pytest.raises(TraceError, match="positions are 30 to 30"):
        Trace.from_tensors({"embed": states["embed"][:1]}, prompt, llama, dtype="float32", positions=[30])
