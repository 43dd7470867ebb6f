"""An engine in a child process: the same outputs and error types, and a crash that ends requests but not the kernel."""

import os
import signal

import pytest
import torch

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench import GenerationConfig, ModelError, PromptError

CONFIG = GenerationConfig(max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def child(llama):
    with workbench.open_engine("numba", llama, isolated=True) as engine:
        yield engine


def test_isolated_engine_equals_the_engine_in_this_process(llama, child):
    here, prompt = workbench.open_engine("numba", llama), random_prompt()
    assert child.generate(prompt, CONFIG).token_ids == here.generate(prompt, CONFIG).token_ids
    mine, theirs = here.trace(prompt), child.trace(prompt)
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[tap], theirs[tap]) for tap in mine)
    assert child.capabilities == here.capabilities


def test_errors_keep_their_type(llama, child):
    with pytest.raises(PromptError, match="not an id of a vocabulary of 97"):
        child.generate(random_prompt().replace(input_ids=[500] * 40), CONFIG)
    with pytest.raises(ValueError, match="dtype='int8'"):
        workbench.open_engine("numba", llama, isolated=True, dtype="int8")


def test_requests_run_after_cancel_and_early_close(child):
    long = GenerationConfig(max_new_tokens=200, ignore_eos=True)
    stream = child.stream(random_prompt(), long, session_id=3)
    next(stream)
    assert child.cancel(3)
    assert list(stream)[-1].status is workbench.ResponseType.CANCEL
    stream = child.stream(random_prompt(1), long)
    next(stream)
    stream.close()
    assert len(child.generate(random_prompt(2), CONFIG).token_ids) == 8


def test_cancel_and_close_end_the_request_in_the_child(tmp_path):
    """With a batch size of one the next request runs only after the first has ended in the child."""
    model = save_llama(tmp_path, max_position_embeddings=60_000)
    endless = GenerationConfig(max_new_tokens=50_000, ignore_eos=True)
    with workbench.open_engine("numba", model, isolated=True, max_batch_size=1, cache_max_entry_count=2000) as engine:
        for number in range(2):
            stream = engine.stream(random_prompt(), endless, session_id=number)
            next(stream)
            engine.cancel(number) if number else stream.close()
            assert len(engine.generate(random_prompt(1), CONFIG).token_ids) == 8


def test_a_killed_process_is_reported(tmp_path):
    model = save_llama(tmp_path, max_position_embeddings=60_000)
    engine = workbench.open_engine("numba", model, isolated=True, cache_max_entry_count=2000)
    stream = engine.stream(random_prompt(), GenerationConfig(max_new_tokens=50_000, ignore_eos=True))
    next(stream)
    os.kill(engine._process.pid, signal.SIGKILL)
    with pytest.raises(ModelError, match=r"the numba engine's process was killed by SIGKILL: open the engine again"):
        list(stream)
    with pytest.raises(ModelError, match="SIGKILL"):
        engine.generate(random_prompt(), CONFIG)
    engine.close()


def test_a_closed_engine_refuses_requests(llama):
    engine = workbench.open_engine("numba", llama, isolated=True)
    engine.close()
    with pytest.raises(ModelError, match="this numba engine was closed: open it again"):
        engine.generate(random_prompt(), CONFIG)
