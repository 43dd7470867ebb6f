"""Traces: save and load round-trip; foreign, truncated and tampered files are refused."""

import json
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench import Trace, TraceError
from workbench.models.truncate_checkpoint import truncate_checkpoint


@pytest.fixture(scope="module")
def trace(engine, japan):
    return engine.trace(japan[0], ["embed", "layers.3"], positions=[2, 29])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def test_save_and_load_round_trip(trace, tmp_path):
    trace.save(tmp_path / "run.safetensors")
    again = Trace.load(tmp_path / "run.safetensors")
    assert list(again) == list(trace) == ["embed", "layers.3"]
    assert all(torch.equal(again[tap], trace[tap]) for tap in trace)
    assert again.positions.tolist() == [2, 29]
    assert again.provenance == trace.provenance
    assert again.provenance["ranges"] == [[29, 30]]
    assert trace.nbytes == 2 * 2 * 576 * 4


def test_a_missing_tap_is_named(trace):
    with pytest.raises(KeyError, match=r"'norm' was not traced; this trace contains embed, layers.3"):
        trace["norm"]


def test_files_that_are_not_traces_are_refused(trace, tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(TraceError, match="cannot be read"):
        Trace.load(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(TraceError, match="cannot be read"):
        Trace.load(path)
    save_file({"embed": torch.zeros(2, 3)}, path)
    with pytest.raises(TraceError, match="not a trace of this version"):
        Trace.load(path)
    trace.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TraceError, match="cannot be read"):
        Trace.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"positions": "[1]"},
        {"positions": "{}"},
        {"positions": "[[1], [2]]"},
        {"taps": '["embed", "logits"]'},
        {"taps": "3"},
        {"provenance": "[1, 2, 3]"},
        {"provenance": "{"},
    ],
)
def test_tampered_metadata_is_refused(trace, tmp_path, change):
    metadata = {
        "format": "workbench-trace-2",
        "positions": "[2, 29]",
        "taps": '["embed"]',
        "crc32": json.dumps({"embed": f"{zlib.crc32(trace['embed'].numpy().tobytes()):08x}"}),
        "provenance": json.dumps(trace.provenance),
    }
    save_file({"embed": trace["embed"].contiguous()}, tmp_path / "x.safetensors", metadata={**metadata, **change})
    with pytest.raises(TraceError):
        Trace.load(tmp_path / "x.safetensors")


TAPS = ["embed", "layers.*", "layers.*.*", "norm", "logits"]


class TestOnDisk:
    @pytest.mark.parametrize("kind", ["numba", "transformers"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_trace_on_disk_equals_the_trace_in_memory(self, llama, kind, dtype, tmp_path):
        engine, prompt = workbench.open_engine(kind, llama, dtype=dtype), random_prompt()
        held = engine.trace(prompt, TAPS, [3, 5, 39])
        stored = engine.trace(prompt, TAPS, [3, 5, 39], path=tmp_path / "t.safetensors")
        assert list(held) == list(stored)
        assert all(torch.equal(held[tap], stored[tap]) for tap in held)
        assert stored.nbytes == held.nbytes
        plain = {key: value for key, value in stored.provenance.items() if key != "words"}
        assert plain == held.provenance
        assert not list(tmp_path.glob("*.part"))

    def test_planned_bytes_equal_traced_bytes_and_respect_max_bytes(self, llama, tmp_path):
        engine, prompt = workbench.open_engine("numba", llama), random_prompt()
        plan = engine.plan_trace(prompt, TAPS, slice(0, 7))
        assert plan.nbytes == engine.trace(prompt, TAPS, slice(0, 7)).nbytes
        assert str(plan).startswith("12 taps x 7 positions in float32: ")
        with pytest.raises(
            TraceError, match=r"12 taps x 40 positions in float32: 0.1 MB do not fit into max_bytes \(0.0 MB\)"
        ):
            engine.trace(prompt, TAPS, max_bytes=1000)
        with pytest.raises(TraceError, match="do not fit"):
            engine.trace(prompt, TAPS, max_bytes=1000, path=tmp_path / "t.safetensors")
        assert not list(tmp_path.iterdir())

    def test_failed_run_leaves_no_files(self, llama, tmp_path, monkeypatch):
        engine = workbench.open_engine("numba", llama)
        monkeypatch.setattr(engine.decoder, "logits", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.trace(random_prompt(), TAPS, path=tmp_path / "t.safetensors")
        assert not list(tmp_path.iterdir())

    def test_tap_missing_from_the_engine_is_reported(self, llama, tmp_path, monkeypatch):
        engine = workbench.open_engine("numba", llama)
        monkeypatch.setattr(engine, "run_trace", lambda prompt, taps, positions, keep: None)
        with pytest.raises(TraceError, match="the engine gave no embed"):
            engine.trace(random_prompt(), ["embed"], path=tmp_path / "t.safetensors")

    def test_one_flipped_bit_is_found_in_its_tap(self, llama, tmp_path):
        engine, path = workbench.open_engine("numba", llama), tmp_path / "t.safetensors"
        engine.trace(random_prompt(), ["embed", "norm"], path=path)
        content = bytearray(path.read_bytes())
        content[-5] ^= 1  # in `norm`
        path.write_bytes(content)
        trace = Trace.load(path)
        assert trace["embed"].shape == (40, 48)
        with pytest.raises(TraceError, match="tap 'norm' .* has checksum .* damaged or changed"):
            trace["norm"]

    def test_token_texts_are_stored_in_the_file(self, engine, japan, tmp_path):
        trace = engine.trace(japan[0], ["embed"], path=tmp_path / "t.safetensors")
        assert trace.provenance["words"][29] == " France"
        assert trace.provenance["model_digest"] == engine.model.digest
        assert trace.spans.tolist() == [-1] * 29 + [0] + [-1] * (len(japan[0]) - 30)

    @pytest.mark.parametrize(
        "change",
        [
            {"tokens": 0},
            {"tokens": "3"},
            {"model": None},
            {"ranges": [[1]]},
            {"ranges": "x"},
            {"words": [1]},
            {"words": ["one"]},
            {"modalities": 3},
        ],
    )
    def test_hostile_provenance_is_refused(self, trace, tmp_path, change):
        spoilt = Trace(dict(trace), trace.positions, {**trace.provenance, **change})
        spoilt.save(tmp_path / "x.safetensors")
        with pytest.raises(TraceError, match="provenance"):
            Trace.load(tmp_path / "x.safetensors")


def test_model_digest_depends_on_weights_but_not_on_version(tmp_path, llama):
    """One changed number in a weight changes the digest; another `transformers_version` does not."""
    other = save_llama(tmp_path / "other")
    config = json.loads((other.path / "config.json").read_text())
    (other.path / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9.9"}))
    assert workbench.load_model(other.path).digest == llama.digest
    tensors = load_file(other.path / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other.path / "model.safetensors", metadata={"format": "pt"})
    assert workbench.load_model(other.path).digest != llama.digest
    cut = workbench.load_model(truncate_checkpoint(llama.path, tmp_path, 2))
    assert cut.digest != llama.digest
