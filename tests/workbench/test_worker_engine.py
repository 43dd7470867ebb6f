"""Engines in environments of their own: a worker that crashes, hangs or talks nonsense is an error here, in time."""

import io
import json
import sys
import time
from pathlib import Path

import pytest
import torch

import workbench
from tests.workbench.small_models import save_llama
from workbench.engines.environments import ENVIRONMENTS, environments_folder, python_of
from workbench.engines.types import Capabilities, GenerationConfig, ResponseType
from workbench.engines.wire import WireError, read_message, write_message
from workbench.engines.worker_engine import WorkerEngine
from workbench.errors import EngineDied, ModelError


class Counting(WorkerEngine):
    def __init__(self, model, fault="", patience=30.0):
        self.dtype, self.device = torch.float32, torch.device("cpu")
        worker = Path(__file__).with_name("small_worker.py")
        super().__init__(
            "counting", model, Path(sys.executable), worker, {"fault": fault}, patience=patience, start_patience=60.0
        )

    @property
    def capabilities(self):
        return Capabilities("counting", ("embed", "norm"), ("float32",), ("cpu",))

    def sampling(self, config):
        return {}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


PROMPT = workbench.Prompt([3, 4, 5, 6], [torch.ones(2, 48)], [(1, 3)])


def test_messages_survive_the_way_and_damage_is_noticed():
    stream = io.BytesIO()
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    write_message(stream, {"number": 1, "text": "é"}, tensors)
    stream.seek(0)
    fields, found = read_message(stream)
    assert fields == {"number": 1, "text": "é"}
    assert {name: value.dtype for name, value in found.items()} == {"a": torch.float32, "b": torch.bfloat16}
    assert torch.equal(found["a"], tensors["a"])
    whole = stream.getvalue()
    for damaged in (b"", whole[:7], whole[:-1], b"x" * 40, whole[:16] + b"[]" + whole[18:]):
        with pytest.raises(WireError):
            read_message(io.BytesIO(damaged))


def test_tokens_and_states_come_back_and_a_stop_token_does_not(llama):
    with Counting(llama) as engine:
        outputs = list(engine.stream(PROMPT, GenerationConfig(max_new_tokens=8)))
        assert [output.token_ids for output in outputs] == [[(18 + 96) % 50], [(19 + 96) % 50], []]
        assert outputs[-1].status is ResponseType.FINISH
        assert engine.generate(PROMPT, GenerationConfig(max_new_tokens=8, ignore_eos=True)).token_ids[-1] == 2
        trace = engine.trace(PROMPT, ["norm"], positions=[1, 3])
        assert trace["norm"][:, 0].tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("crash", EngineDied, r"killed by SIGKILL \(it last said: segmentation fault ahead\): open the engine again"),
        ("hang", EngineDied, "did not answer for 1 s while it generated and was killed"),
        ("garbage", EngineDied, "killed by SIGKILL"),
    ],
)
def test_a_worker_that_is_lost_ends_every_request(llama, fault, error, words):
    with Counting(llama, fault, patience=1.0) as engine:
        began = time.monotonic()
        with pytest.raises(error, match=words):
            engine.generate(PROMPT)
        assert time.monotonic() - began < 20
        with pytest.raises(EngineDied):
            engine.trace(PROMPT, ["norm"])


def test_an_error_of_one_request_leaves_the_worker_running(llama):
    with Counting(llama, "error") as engine:
        for _ in range(2):
            with pytest.raises(ModelError, match="counting failed while it generated: ValueError: not today"):
                engine.generate(PROMPT)


def test_too_few_rows_are_refused(llama):
    with Counting(llama, "short") as engine, pytest.raises(ModelError, match="returned 3 rows at norm for 4 tokens"):
        engine.trace(PROMPT, ["norm"])


def test_a_worker_that_cannot_start_says_why(llama):
    with pytest.raises(ModelError, match="counting failed while it opened the model: OSError: no such model"):
        Counting(llama, "no start")


def test_an_engine_that_is_not_installed_says_how_to_install_it(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    assert environments_folder() == tmp_path / "engines"
    with pytest.raises(ModelError, match="vllm is not installed: run `workbench engines install vllm` once"):
        workbench.open_engine("vllm", llama)
    folder = ENVIRONMENTS["vllm"].folder
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    (folder / "workbench.json").write_text("{broken")
    assert ENVIRONMENTS["vllm"].installed is None
    (folder / "workbench.json").write_text(json.dumps({"version": "0.1"}))
    with pytest.raises(ModelError, match=r"vllm 0.1 is installed but this workbench is tested with 0.32.0"):
        python_of("vllm")
    with pytest.raises(ModelError, match="no environment for 'numba'"):
        python_of("numba")


def test_engines_are_listed(capsys, tmp_path, monkeypatch):
    from workbench.cli.main import main

    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    assert main(["engines", "list"]) == 0
    listed = capsys.readouterr().out
    assert "`workbench engines install vllm`" in listed
    assert f"transformers             {__import__('transformers').__version__}" in listed
    assert main(["engines", "install", "bogus"]) == 2
    assert "choose one of vllm, llama-cpp" in capsys.readouterr().err


def test_a_request_that_waits_for_others_is_not_hung(llama):
    """Only a worker that answers nobody within its patience is killed."""
    import queue
    import threading

    with Counting(llama, patience=1.0) as engine:
        waiting: queue.Queue = queue.Queue()
        engine._channels[99] = waiting
        ended = threading.Event()

        def keep_busy():
            while not ended.wait(0.3):
                engine.generate(PROMPT, GenerationConfig(max_new_tokens=3))

        busy = threading.Thread(target=keep_busy)
        busy.start()
        threading.Timer(2.5, lambda: waiting.put(({"kind": "end"}, {}))).start()
        assert engine._wait(waiting, 1.0, "while it waited")[0]["kind"] == "end"
        ended.set()
        busy.join()


def test_an_item_that_is_used_twice_crosses(llama):
    row = torch.ones(2, 48)
    with Counting(llama) as engine:
        prompt = workbench.Prompt([3, 4, 5, 6, 7, 8], [row, row], [(0, 2), (3, 5)])
        assert len(engine.trace(prompt, ["norm"])["norm"]) == 6
