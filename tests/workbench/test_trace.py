"""Traces: saved and loaded whole; foreign, truncated and tampered files are refused."""

import json
import zlib

import pytest
import torch
from safetensors.torch import save_file

from workbench import Trace, TraceError


@pytest.fixture(scope="module")
def trace(engine, japan):
    return engine.trace(japan[0], ["embed", "layers.3"], positions=[2, 29])


def test_saved_and_loaded_whole(trace, tmp_path):
    trace.save(tmp_path / "run.safetensors")
    again = Trace.load(tmp_path / "run.safetensors")
    assert list(again) == list(trace) == ["embed", "layers.3"]
    assert all(torch.equal(again[tap], trace[tap]) for tap in trace)
    assert again.positions.tolist() == [2, 29]
    assert again.provenance == trace.provenance
    assert again.provenance["ranges"] == [[29, 30]]
    assert trace.nbytes == 2 * 2 * 576 * 4


def test_a_missing_tap_is_named(trace):
    with pytest.raises(KeyError, match=r"'norm' was not traced; this trace holds embed, layers.3"):
        trace["norm"]


def test_files_that_are_no_traces(trace, tmp_path):
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
def test_tampered_metadata(trace, tmp_path, change):
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
