"""The reference with streamed weights: equal to the one in memory, interrupted and continued, and with damaged files."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import workbench
from tests.sweep.small_configs import small_network
from tests.workbench.small_models import save_llama
from workbench.cli.main import main
from workbench.comparison import reference_cache, runs_together, unfinished_runs
from workbench.comparison.floor_runs import reference_runs
from workbench.comparison.noise_floor import NoiseFloor
from workbench.comparison.reference_cache import reference_pair, reference_run
from workbench.comparison.reference_files import write_references
from workbench.comparison.reference_pass import ReferencePass
from workbench.engines.transformers import loading, streamed_weights
from workbench.engines.transformers.reference import TransformersReference
from workbench.faults import FAULTS
from workbench.progress import Stopped
from workbench.trace import Trace

IDS = list(range(20, 44))
TAPS = ("embed", "layers.*", "layers.*.*", "norm", "logits")


@pytest.fixture(autouse=True)
def together(monkeypatch, tmp_path):
    """Runs go through small checkpoints together too, and keep what they have done in a folder of the test's own."""
    monkeypatch.setattr(runs_together, "TOGETHER_BYTES", -1)
    monkeypatch.setattr(unfinished_runs, "cache_folder", lambda: tmp_path / "cache" / "models")
    reference_cache.forget()
    yield tmp_path / "cache" / "unfinished-runs"
    reference_cache.forget()


@pytest.fixture
def sharded(tmp_path):
    """A random Llama, one file per layer; returns its folder."""
    return _sharded(tmp_path, "LlamaForCausalLM", "llama")


@pytest.fixture
def experts(tmp_path):
    """A random Qwen3-MoE, one file per layer."""
    return _sharded(tmp_path, "Qwen3MoeForCausalLM", "qwen3_moe")


def _sharded(tmp_path, name, model_type):
    folder = tmp_path / "model"
    small_network(name, model_type).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shard_of = {
        name: f"layer-{name.split('.')[2]}.safetensors" if "layers." in name else "rest.safetensors" for name in tensors
    }
    for shard in set(shard_of.values()):
        save_file(
            {name: tensors[name] for name in tensors if shard_of[name] == shard}, folder / shard, {"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return folder


def _run(model, folder=None, progress=lambda fraction: None, ids=IDS):
    exact, rounded = reference_pair(model, "float32", streamed=True)
    what = ReferencePass(workbench.Prompt(ids), TAPS)
    return reference_runs(exact, rounded, [what], progress=progress, unfinished=folder)[0]


def _stop_after(share):
    def progress(fraction):
        if fraction > share:
            raise Stopped

    return progress


def _check_equal(one, other):
    assert all(torch.equal(one.trace[tap], other.trace[tap]) for tap in other.trace)
    assert all(torch.equal(one.floor.errors[tap], error) for tap, error in other.floor.errors.items())
    assert dict(one.floor.digests) == dict(other.floor.digests)
    assert one.floor.typical == other.floor.typical
    assert one.floor.expert_choices == other.floor.expert_choices


def test_smollm2_is_computed_as_in_memory():
    model = workbench.load_model("smollm2-135m")
    ids = model.chat_ids("Say something about foxes.")
    prompt = workbench.Prompt(ids, [model.token_rows(ids[4:8])], [(5, 9)])
    whole, streamed = (
        reference_runs(
            *reference_pair(model, "float32", streamed=each), [ReferencePass(prompt, TAPS)], progress=lambda _: None
        )[0]
        for each in (False, True)
    )
    _check_equal(streamed, whole)


def test_several_prompts_read_the_weights_once(sharded, monkeypatch):
    model = workbench.load_model(str(sharded))
    read = []
    own = streamed_weights.StreamedWeights._read_unit
    monkeypatch.setattr(
        streamed_weights.StreamedWeights,
        "_read_unit",
        lambda self, unit: (read.append((self._dtype, unit)), own(self, unit))[1],
    )
    exact, rounded = reference_pair(model, "float32", streamed=True)
    read.clear()
    prompts = [workbench.Prompt(IDS), workbench.Prompt(IDS[::-1])]
    found = reference_runs(exact, rounded, [ReferencePass(each, TAPS) for each in prompts], progress=lambda _: None)
    assert sorted(set(read), key=str) == sorted(read, key=str)  # nothing twice, by ten runs
    assert len(read) == 2 * len(exact.streamed.units)
    monkeypatch.undo()
    for each, run in zip(prompts, found, strict=True):
        _check_equal(
            run, reference_runs(*reference_pair(model, "float32", streamed=False), [ReferencePass(each, TAPS)])[0]
        )


def test_verdict_and_divergence_with_streamed_weights(tmp_path):
    llama = save_llama(tmp_path)
    rows = torch.randn(4, llama.text_config.hidden_size, generator=torch.Generator().manual_seed(0)) * 0.1
    prompt = workbench.Prompt(IDS, [rows], [(6, 10)])
    engine = workbench.open_engine("numba", llama)
    assert workbench.check_engine(engine, prompt, streamed=True).verdict == "noise"
    engine = FAULTS["rows reversed"].inject(engine)
    found = workbench.first_divergence(engine, prompt, streamed=True)
    assert found.divergence.tap == "embed"
    local = workbench.local_error(engine, prompt, streamed=True)
    assert local.origin == "embed"


@pytest.mark.parametrize("kind", ["sharded", "experts"])
def test_interrupted_runs_go_on_where_they_stopped(kind, together, request):
    model = workbench.load_model(str(request.getfixturevalue(kind)))
    whole = _run(model)
    assert not any(together.glob("*/*"))
    with pytest.raises(Stopped):
        _run(model, progress=_stop_after(0.5))
    assert [path.name for path in together.glob("*/*states*")] == ["states.safetensors"]
    begun = []
    again = _run(model, progress=begun.append)
    assert begun[0] > 0.5
    _check_equal(again, whole)
    assert not any(together.glob("*"))


def test_runs_with_depth_taps_go_on_too(sharded):
    model, taps = workbench.load_model(str(sharded)), ["depth.*", "norm"]
    what = [ReferencePass(workbench.Prompt(IDS), taps)]
    expected = reference_runs(*reference_pair(model, "float32", streamed=False), what)[0]
    reference_cache.forget()
    pair = reference_pair(model, "float32", streamed=True)
    with pytest.raises(Stopped):
        reference_runs(*pair, what, progress=_stop_after(0.5))
    reference_cache.forget()
    again = []
    _check_equal(
        reference_runs(*reference_pair(model, "float32", streamed=True), what, progress=again.append)[0], expected
    )
    assert again[0] > 0.5


def test_runs_that_fail_as_soon_as_they_go_on_keep_what_was_done(experts, monkeypatch):
    model = workbench.load_model(str(experts))
    whole = _run(model)
    with pytest.raises(Stopped):
        _run(model, progress=_stop_after(0.5))

    def fails(self, *arguments):
        raise workbench.ModelError("no memory for a copy")

    with monkeypatch.context() as patched:
        patched.setattr(streamed_weights.StreamedWeights, "new_network", fails)
        with pytest.raises(workbench.ModelError, match="no memory for a copy"):
            _run(model)
    begun = []
    _check_equal(_run(model, progress=begun.append), whole)
    assert begun[0] > 0.5


def test_a_prompt_whose_states_are_nan_does_not_stop_the_others(sharded, tmp_path):
    """The embedding of token 100 is NaN, and one prompt has it."""
    tensors = load_file(sharded / "rest.safetensors")
    tensors["model.embed_tokens.weight"][100] = float("nan")
    save_file(tensors, sharded / "rest.safetensors", {"format": "pt"})
    for number, ids in enumerate((IDS, [*IDS, 100], IDS[::-1])):
        workbench.Prompt(ids).save(tmp_path / f"p{number}.json")
    files, out = sorted(tmp_path.glob("p?.json")), tmp_path / "out"
    report = write_references(str(sharded), files, out, "float32", streamed=True, progress=lambda fraction: None)
    assert [path.stem for path in report.written] == ["p0", "p2"]
    assert report.failed[0][0].endswith("p1.json")
    assert "NaN or infinity" in report.failed[0][1]


def test_interrupted_run_of_another_prompt_is_refused(sharded, tmp_path):
    model = workbench.load_model(str(sharded))
    folder = tmp_path / "kept"
    with pytest.raises(Stopped):
        _run(model, folder, _stop_after(0.5))
    with pytest.raises(workbench.TraceError, match="unfinished runs of something else .*give another folder"):
        _run(model, folder, ids=IDS[::-1])
    _check_equal(_run(model, folder), _run(model))


def test_damaged_states_are_refused_by_name_or_begun_again(sharded, tmp_path, together):
    model, folder = workbench.load_model(str(sharded)), tmp_path / "kept"
    for where in (folder, None):
        with pytest.raises(Stopped):
            _run(model, where, _stop_after(0.5))
    for path in (folder / "states.safetensors", *together.glob("*/states.safetensors")):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    with pytest.raises(workbench.TraceError, match="Remove the folder"):
        _run(model, folder)
    _check_equal(_run(model), _run(model))


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_shard_that_is_gone_in_the_middle_is_named_with_its_layer(sharded, tmp_path, damage):
    model = workbench.load_model(str(sharded))
    whole, shard, spare = _run(model), sharded / "layer-2.safetensors", tmp_path / "spare"
    reference_cache.forget()
    shutil.copy2(shard, spare)

    def break_it(fraction):
        if shard.exists() and shard.stat().st_size == spare.stat().st_size:
            shard.unlink() if damage == "missing" else shard.write_bytes(spare.read_bytes()[:-4000])

    _ = model.digest
    with pytest.raises(workbench.ModelError, match=r"layer-2\.safetensors.*model\.layers\.2.*2 layers done are kept"):
        _run(model, progress=break_it)
    shutil.copy2(spare, shard)
    reference_cache.forget()
    again = []
    _check_equal(_run(model, progress=again.append), whole)
    assert again[0] > 0.4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("kind", ["sharded", "experts"])
def test_streamed_weights_on_a_gpu(kind, request):
    model = workbench.load_model(str(request.getfixturevalue(kind)))
    what = [ReferencePass(workbench.Prompt(IDS), TAPS)]
    whole, streamed = (reference_pair(model, "bfloat16", "cuda", streamed=each) for each in (False, True))
    # CUDA adds the results of experts in any order.
    check = _check_equal if kind == "sharded" else _check_close
    expected = reference_runs(*whole, what)[0]
    check(reference_runs(*streamed, what, progress=lambda fraction: None)[0], expected)
    with pytest.raises(Stopped):
        reference_runs(*streamed, what, progress=_stop_after(0.5))
    begun = []
    check(reference_runs(*streamed, what, progress=begun.append)[0], expected)
    assert begun[0] > 0.5
    if kind == "sharded":
        engine = workbench.open_engine("numba", model, dtype="bfloat16", device="cuda")
        assert workbench.check_engine(engine, what[0].prompt, device="cuda", streamed=True).verdict == "noise"


def _check_close(one, other):
    for tap in other.trace:
        torch.testing.assert_close(one.trace[tap], other.trace[tap], rtol=1e-9, atol=1e-12)
        assert float((one.floor.errors[tap] / other.floor.errors[tap].clamp(min=1e-30)).max()) < 10


def test_full_disk_does_not_stop_the_runs(sharded, monkeypatch, capsys):
    model = workbench.load_model(str(sharded))
    whole = _run(model)

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(unfinished_runs, "atomic_write", full)
    monkeypatch.setattr(unfinished_runs, "INTERVAL", -1.0)
    _check_equal(_run(model), whole)
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1
    assert "WORKBENCH_CACHE" in said


def test_states_that_are_written_at_every_layer_change_nothing(sharded, monkeypatch, together):
    model = workbench.load_model(str(sharded))
    whole = _run(model)
    monkeypatch.setattr(unfinished_runs, "INTERVAL", -1.0)
    _check_equal(_run(model), whole)
    assert not any(together.glob("*"))


def test_index_that_lies_is_refused(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.1.mlp.up_proj.weight"] = "layer-2.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(workbench.ModelError, match=r"lacks tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        TransformersReference(workbench.load_model(str(sharded)), streamed=True)


def test_nan_in_one_expert_is_named_by_its_layer(experts):
    shard = experts / "layer-3.safetensors"
    tensors = load_file(shard)
    (name,) = [name for name in tensors if name.endswith("experts.0.down_proj.weight")]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(workbench.TraceError, match=r"NaN or infinity at tap 'layers\.3\.mlp'"):
        _run(workbench.load_model(str(experts)), ids=list(range(20, 84)))


def test_missing_tensor_and_wrong_shape_are_named(sharded):
    shard = sharded / "layer-1.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:-1].clone()
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(
        workbench.ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is \(\d+, 64\) in the checkpoint and"
    ):
        TransformersReference(workbench.load_model(str(sharded)), streamed=True)


def test_what_does_not_fit_is_refused_or_streamed(sharded, monkeypatch):
    model = workbench.load_model(str(sharded))
    monkeypatch.setattr(loading, "free_memory", lambda device: 1000)
    with pytest.raises(workbench.ModelError, match=r"take 0\.0 GB in float64, and 0\.0 GB are free"):
        TransformersReference(model, dtype="float64", streamed=False)
    monkeypatch.setattr(loading, "STREAMED_BYTES", 1000)
    assert TransformersReference(model, dtype="float64").streamed is not None


def test_progress_of_a_stopped_verdict_is_kept_too(sharded):
    model, prompt = workbench.load_model(str(sharded)), workbench.Prompt(IDS)
    expected = reference_run(model, prompt, "float32", TAPS, streamed=False)[0]
    reference_cache.forget()
    with pytest.raises(Stopped):
        reference_run(model, prompt, "float32", TAPS, progress=_stop_after(0.6), streamed=True)
    found = reference_run(model, prompt, "float32", TAPS, progress=lambda fraction: None, streamed=True)[0]
    assert all(torch.equal(found[tap], expected[tap]) for tap in expected)


def _prompt_files(folder):
    folder.mkdir()
    for number in range(3):
        workbench.Prompt(IDS[number:]).save(folder / f"p{number}.json")
    workbench.Prompt([1 << 40]).save(folder / "bad.json")
    return sorted(folder.glob("*.json"))


def test_references_of_many_prompts_are_written_and_a_bad_prompt_is_reported(sharded, tmp_path, monkeypatch, capsys):
    """States are kept at every layer, so that those that are in the files are dropped from memory."""
    monkeypatch.setattr(unfinished_runs, "INTERVAL", -1.0)
    files, out = _prompt_files(tmp_path / "prompts"), tmp_path / "out"
    arguments = ["references", *map(str, files), "--model", str(sharded), "--dtype", "float32", "--out", str(out)]
    assert main([*arguments, "--streamed"]) == 1
    captured = capsys.readouterr()
    assert "3 written, 1 failed" in captured.out
    assert "bad.json: " in captured.err
    model = workbench.load_model(str(sharded))
    for number in range(3):
        alone = reference_runs(
            *reference_pair(model, "float32", streamed=False), [ReferencePass(workbench.Prompt(IDS[number:]), TAPS[:2])]
        )[0]
        trace, floor = (
            Trace.load(out / f"p{number}.safetensors"),
            NoiseFloor.load(out / f"p{number}.floor-float32.safetensors"),
        )
        assert all(torch.equal(trace[tap], alone.trace[tap]) for tap in alone.trace)
        assert all(torch.equal(floor.errors[tap], alone.floor.errors[tap]) for tap in alone.floor.errors)
    with pytest.raises(ValueError, match="two prompts are named p0"):
        write_references(str(sharded), [files[1], files[1]], out, "float32")


def test_ray_workers_write_the_same_references(sharded, tmp_path):
    pytest.importorskip("ray")
    files = _prompt_files(tmp_path / "prompts")
    code = "import sys; from workbench.cli.main import main; sys.exit(main(sys.argv[1:]))"
    folders = [tmp_path / name for name in ("here", "there")]
    arguments = ["references", *map(str, files), "--model", str(sharded), "--dtype", "float32", "--streamed", "--out"]
    assert main([*arguments, str(folders[0])]) == 1
    done = subprocess.run(  # a process of its own: Ray leaves others behind
        [sys.executable, "-c", code, *arguments, str(folders[1]), "--workers", "2"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}, capture_output=True, text=True,
        timeout=250,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-2000:]
    assert "3 written, 1 failed" in done.stdout
    for path in folders[0].glob("p?.safetensors"):
        one, other = Trace.load(path), Trace.load(folders[1] / path.name)
        assert all(torch.equal(one[tap], other[tap]) for tap in one)
