"""Local errors: each layer of the reference on the engine's own input, and what follows for the verdict."""

import pytest
import torch
import transformers

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench.comparison.local_error import local_error
from workbench.comparison.reference_cache import reference_engine
from workbench.faults import FAULTS


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=6)


@pytest.fixture(scope="module")
def smollm():
    return workbench.load_model("smollm2-135m")


def test_layers_run_on_the_states_of_the_other_engine(llama):
    """Against Transformers' layers called one by one."""
    prompt = random_prompt()
    run = (
        FAULTS["rows reversed"]
        .inject(workbench.open_engine("numba", llama))
        .trace(prompt, ["embed", "layers.*", "layers.*.*", "norm", "logits"])
    )
    local: dict[str, torch.Tensor] = {}
    reference_engine(llama, "float64").run_local(prompt, run, 0, lambda tap, state: local.update({tap: state}))
    network = transformers.AutoModelForCausalLM.from_pretrained(llama.path, dtype=torch.float64).eval()
    positions = torch.arange(len(prompt))[None]
    with torch.no_grad():
        for number, layer in enumerate(network.model.layers):
            state = run[f"layers.{number - 1}" if number else "embed"].double()[None]
            rope = network.model.rotary_emb(state, positions)
            expected = layer(state, position_embeddings=rope, attention_mask=None)
            expected = expected[0] if isinstance(expected, tuple) else expected
            torch.testing.assert_close(
                local[f"layers.{number}"], expected.reshape(len(prompt), -1), rtol=1e-6, atol=1e-7
            )
        normed = network.model.norm(run["layers.5"].double())
        torch.testing.assert_close(local["norm"], normed, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(local["logits"], network.lm_head(run["norm"].double()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["gate and up exchanged", "KV heads exchanged", "two layers exchanged"])
def test_only_the_layers_with_the_fault_add_it(llama, name):
    errors = local_error(FAULTS[name].inject(workbench.open_engine("numba", llama)), random_prompt())
    outcomes = {row["tap"]: row["outcome"] for row in errors.table()}
    adds = [tap for tap, outcome in outcomes.items() if outcome == "adds"]
    assert adds[0] == errors.origin == errors.accumulated.first_divergence.tap
    layers = {tap.split(".")[1] for tap in adds}
    assert layers == ({"3", "4"} if name == "two layers exchanged" else {errors.origin.split(".")[1]})
    assert outcomes["layers.5"] in ("inherits", "adds")
    assert outcomes["logits"] == "inherits"
    assert "only inherit it" in str(errors)


def test_wrong_splice_is_inherited_by_every_layer(llama):
    errors = local_error(FAULTS["range +1"].inject(workbench.open_engine("numba", llama)), random_prompt())
    outcomes = {row["tap"]: row["outcome"] for row in errors.table()}
    assert errors.origin == "embed"
    assert {outcomes[f"layers.{number}"] for number in range(6)} == {"inherits"}


def test_fault_that_drowns_in_accumulated_rounding_is_found(smollm):
    ids = smollm.chat_ids("What is the capital of France?")
    prompt = workbench.Prompt(ids, [smollm.token_rows([504, 28])], [(5, 7)])
    with workbench.open_engine("numba", smollm, dtype="bfloat16") as engine:
        clean = local_error(engine, prompt)
        down = engine.decoder.layers[26].down
        weight = down.weight.clone()
        weight[:, :100] *= 1.5
        down.weight = weight
        found = workbench.first_divergence(engine, prompt)
    assert (clean.accumulated.verdict, clean.local.verdict, clean.origin) == ("noise", "noise", None)
    assert found.comparison.verdict == "noise"
    assert (found.divergence.tap, found.last_good) == ("layers.26.mlp", "layers.26.attention")
    assert "drowns" in str(found)


def test_engine_without_layers_is_refused(llama):
    engine = workbench.open_engine("numba", llama)
    run = engine.trace(random_prompt(), ["embed", "norm"])
    with pytest.raises(workbench.TraceError, match=r"layers\.0"):
        reference_engine(llama, "float64").local_taps(random_prompt(), run)
    some = engine.trace(random_prompt(), ["embed", "layers.*"], slice(0, 10))
    with pytest.raises(workbench.TraceError, match="30 of 40 positions"):
        reference_engine(llama, "float64").local_taps(random_prompt(), some)
