"""The LMDeploy adapter, tested with a stand-in for LMDeploy's Python API.

The stand-in has the signatures of version 0.18.0 and returns scripted outputs, so no GPU is needed.
test_turbomind.py tests the real engine.
"""

import asyncio
import dataclasses
import enum
import sys
import threading
import time
import types

import pytest
import torch

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench import GenerationConfig, ModelError, Prompt, PromptError, ResponseType
from workbench.engines.lmdeploy.compat import embeddings_for, infer_arguments, installed_version
from workbench.errors import EngineDied


class Status(enum.Enum):
    SUCCESS = 1
    FINISH = 2
    SESSION_NOT_EXIST = 5
    OUT_OF_MEMORY = 13
    CANCEL = 9


@dataclasses.dataclass
class Output:
    status: Status
    token_ids: list
    logprobs: list | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


@dataclasses.dataclass
class EngineConfig:
    dtype: str = "auto"
    tp: int = 1
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_max_entry_count: float = 0.8


@dataclasses.dataclass
class TheirConfig:
    max_new_tokens: int = 512
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    temperature: float = 0.8
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_token_ids: list | None = None
    bad_token_ids: list | None = None
    min_new_tokens: int | None = None
    logprobs: int | None = None
    output_logits: str | None = None
    output_last_hidden_state: str | None = None


@pytest.fixture
def lmdeploy(monkeypatch):
    """The stand-in; `calls` contains the arguments it received, `script` its outputs: lists of (status, tokens)."""
    module = types.ModuleType("lmdeploy")
    module.__version__ = "0.18.0"
    module.calls, module.cancels, module.closed, module.ended = [], [], [], []
    module.script = [[(Status.SUCCESS, [5]), (Status.SUCCESS, [6, 7]), (Status.FINISH, [8])]]
    module.endless = False
    module.TurbomindEngineConfig, module.GenerationConfig = EngineConfig, TheirConfig

    class Instance:
        async def async_cancel(self, session_id=None):
            module.cancels.append(session_id)

        async def async_stream_infer(
            self, session_id, input_ids, input_embeddings=None, input_embedding_ranges=None, multimodal=None, gen_config=None,
            stream_output=False, **kwargs,
        ):  # fmt: skip
            module.calls.append(
                {
                    "ids": input_ids,
                    "items": input_embeddings,
                    "ranges": input_embedding_ranges,
                    "config": gen_config,
                    **kwargs,
                }
            )
            prompt, made = len(input_ids), 0
            whole = torch.arange(float((prompt + 40) * 48)).reshape(-1, 48)
            table = torch.eye(97)
            generated = []
            for status, tokens in module.script[0]:
                generated += tokens
                made += len(tokens)
                rows = prompt + made - 1
                states = {"all": whole[:rows], "generation": whole[prompt - 1 : rows], None: None}
                logits = {
                    "generation": table[generated],
                    "all": torch.cat([torch.zeros(prompt - 1, 97), table[generated]]),
                    None: None,
                }
                logprobs = [{token: -0.5} for token in tokens] if gen_config.logprobs else None
                if status.name == "SESSION_NOT_EXIST":
                    yield Output(status, [])
                    return
                yield Output(
                    status,
                    list(tokens),
                    logprobs,
                    logits[gen_config.output_logits],
                    states[gen_config.output_last_hidden_state],
                )
                try:
                    while module.endless:
                        await asyncio.sleep(0.01)
                finally:
                    module.ended.append(session_id)

    class TurboMind:
        def __init__(self, path, engine_config=None, trust_remote_code=False):
            self.path, self.config = path, engine_config
            module.opened = self

        def create_instance(self):
            return Instance()

        def close(self):
            module.closed.append(self.path)

    turbomind, supported = (
        types.ModuleType("lmdeploy.turbomind"),
        types.ModuleType("lmdeploy.turbomind.supported_models"),
    )
    turbomind.TurboMind = TurboMind
    supported.SUPPORTED_ARCHS = {"LlamaForCausalLM": "llama"}
    supported.is_supported = lambda path, trust_remote_code=False: True
    for name, each in {"lmdeploy": module, "lmdeploy.turbomind": turbomind, supported.__name__: supported}.items():
        monkeypatch.setitem(sys.modules, name, each)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "no GPU at all")
    return module


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def engine(lmdeploy, llama):
    with workbench.open_engine("turbomind", llama, max_batch_size=4) as engine:
        yield engine


def test_prompt_and_config_become_lmdeploy_arguments(engine, lmdeploy):
    prompt = random_prompt()
    config = GenerationConfig(max_new_tokens=9, repetition_penalty=1.2, stop_token_ids=[50], bad_token_ids=[3])
    assert engine.generate(prompt, config).token_ids == [5, 6, 7, 8]
    (call,) = lmdeploy.calls
    assert call["ids"] == list(prompt.input_ids)
    assert call["ranges"] == [[4, 9], [20, 29]]
    assert all(torch.equal(a, b) for a, b in zip(call["items"], prompt.input_embeddings, strict=True))
    theirs = call["config"]
    assert (theirs.max_new_tokens, theirs.top_k, theirs.temperature, theirs.repetition_penalty) == (9, 1, 1.0, 1.2)
    assert (theirs.stop_token_ids, theirs.bad_token_ids) == ([2, 50], [3])
    assert (lmdeploy.opened.config.dtype, lmdeploy.opened.config.session_len) == ("float16", 256)


def test_text_prompts_pass_none_for_embeddings(engine, lmdeploy):
    engine.generate(Prompt([5, 6, 7]), GenerationConfig(max_new_tokens=4))
    assert (lmdeploy.calls[0]["items"], lmdeploy.calls[0]["ranges"]) == (None, None)


def test_tokens_and_states_are_streamed_once(engine):
    config = GenerationConfig(max_new_tokens=4, output_last_hidden_state="all", output_logits="generation", logprobs=2)
    outputs = list(engine.stream(random_prompt(), config))
    assert [output.token_ids for output in outputs] == [[5], [6, 7], [8]]
    assert [output.num_token for output in outputs] == [1, 3, 4]
    assert [len(output.last_hidden_state) for output in outputs] == [40, 2, 1]
    assert [len(output.logits) for output in outputs] == [1, 2, 1]
    joined = engine.generate(random_prompt(), config)
    assert torch.equal(joined.last_hidden_state, torch.arange(43.0 * 48).reshape(43, 48))
    assert [max(each, key=each.get) for each in joined.logprobs] == [5, 6, 7, 8]


def test_stop_tokens_are_not_returned(engine, lmdeploy):
    lmdeploy.script[0] = [(Status.SUCCESS, [5]), (Status.FINISH, [6, 2])]
    output = engine.generate(random_prompt(), GenerationConfig(max_new_tokens=9, logprobs=1))
    assert (output.token_ids, output.num_token, len(output.logprobs)) == ([5, 6], 2, 2)
    sampled = GenerationConfig(max_new_tokens=9, logprobs=1, do_sample=True)
    assert engine.generate(random_prompt(), sampled).logprobs == [{5: -0.5}, {6: -0.5}]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("SESSION_NOT_EXIST", "it rejected the request's embeddings"),
        ("OUT_OF_MEMORY", "the request does not fit into its KV cache: raise"),
    ],
)
def test_error_statuses_become_readable_errors(engine, lmdeploy, status, words):
    lmdeploy.script[0] = [(Status[status], [])]
    with pytest.raises(ModelError, match=f"lmdeploy 0.18.0 answered {status}: {words}"):
        engine.generate(random_prompt(), GenerationConfig(max_new_tokens=2))
    lmdeploy.script[0] = [(Status.FINISH, [5])]
    assert engine.generate(random_prompt(), GenerationConfig(max_new_tokens=1)).token_ids == [5]


def test_invalid_prompts_are_refused_unless_check_is_off(engine, lmdeploy, llama):
    wrong = random_prompt().replace(embedding_ranges=[(20, 25), (4, 13)])
    with pytest.raises(PromptError, match="before it in the prompt"):
        engine.generate(wrong, GenerationConfig(max_new_tokens=2))
    assert lmdeploy.calls == []
    with workbench.open_engine("turbomind", llama, check=False) as unchecked:
        unchecked.generate(wrong, GenerationConfig(max_new_tokens=2))
    assert lmdeploy.calls[0]["ranges"] == [[20, 25], [4, 13]]


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_cancel_and_early_close_reach_lmdeploy(engine, lmdeploy):
    lmdeploy.endless = True
    stream = engine.stream(random_prompt(), GenerationConfig(max_new_tokens=9), session_id=1)
    next(stream)
    assert engine.cancel(1)
    wait_until(lambda: lmdeploy.cancels == [0])
    lmdeploy.endless = False
    assert list(stream)[-1].status is ResponseType.CANCEL
    lmdeploy.endless = True
    stream = engine.stream(random_prompt(), GenerationConfig(max_new_tokens=9))
    next(stream)
    stream.close()
    wait_until(lambda: 2 in lmdeploy.ended)  # the second request's number; the first may still be ending


def test_closing_ends_running_requests(lmdeploy, llama):
    lmdeploy.endless = True
    engine = workbench.open_engine("turbomind", llama)
    stream, failed = engine.stream(random_prompt(), GenerationConfig(max_new_tokens=9)), []
    next(stream)

    def wait():
        try:
            next(stream)
        except ModelError as error:
            failed.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    engine.close()
    thread.join(20)
    assert failed == ["the engine was closed, or the request was dropped, before it ended"]
    for act in (lambda: engine.generate(random_prompt()), lambda: engine.trace(random_prompt(), ["norm"])):
        with pytest.raises(ModelError, match="was closed"):
            act()
    engine.close()


def test_depth_sweep_opens_and_closes_truncated_checkpoints(lmdeploy, llama):
    with workbench.open_engine("turbomind", llama, depth_sweep=True) as engine:
        trace = engine.trace(random_prompt(), ["depth.1", "depth.3", "norm"])
    assert list(trace) == ["depth.1", "depth.3", "norm"]
    assert trace["depth.1"].shape == (40, 48)
    cut = [path for path in lmdeploy.closed if "workbench-depth-" in path]
    assert len(cut) == 2


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"pages": 3}, TypeError, "TurbomindEngineConfig has no pages"),
        ({"dtype": "float32"}, ValueError, "dtype='float32'"),
        ({"device": "cpu"}, ModelError, "device='cuda'"),
        ({"device": "cuda:1"}, ModelError, r"devices=\[1\]"),
    ],
)
def test_unsupported_options_are_refused_by_name(lmdeploy, llama, options, kind, words):
    with pytest.raises(kind, match=words):
        workbench.open_engine("turbomind", llama, **options)


@pytest.mark.parametrize(("version", "words"), [("0.4.2", "older than 0.5.0"), ("soon", "which is not valid")])
def test_unsupported_versions_are_refused(lmdeploy, version, words):
    lmdeploy.__version__ = version
    with pytest.raises(ModelError, match=words):
        installed_version()


def test_arguments_follow_the_lmdeploy_version():
    from packaging.version import Version

    def old(
        session_id,
        input_ids,
        input_embeddings=None,
        input_embedding_ranges=None,
        sequence_start=True,
        sequence_end=False,
        step=0,
    ):
        pass

    def later(session_id, input_ids, gen_config=None):
        pass

    wanted = {"session_id": 1, "input_ids": [1], "input_embeddings": [], "input_embedding_ranges": []}
    assert infer_arguments(old, Version("0.14"), wanted) == {
        **wanted,
        "sequence_start": True,
        "sequence_end": True,
        "step": 0,
    }
    with pytest.raises(ModelError, match="takes no input_embeddings, input_embedding_ranges in later"):
        infer_arguments(later, Version("0.19"), wanted)
    item = torch.ones(2, 3, dtype=torch.bfloat16)
    assert embeddings_for(Version("0.12"), [item])[0] is not None
    assert embeddings_for(Version("0.11"), [item])[0].dtype == "float32"


def test_opening_without_a_gpu_is_refused(lmdeploy, llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="needs an NVIDIA GPU"):
        workbench.open_engine("turbomind", llama)


def test_engine_died_is_a_model_error():
    assert issubclass(EngineDied, ModelError)
