"""Probes: a sound engine passes all; for each question there is a fault that is answered with no."""

import threading
from dataclasses import replace

import pytest
import torch

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench import Prompt, PromptError, Span, probe
from workbench.comparison.probes import PROBES, _Subject
from workbench.faults import FAULTS, FaultyEngine
from workbench.faults.batching_faults import random_states, stale_prefix_cache
from workbench.faults.inject import change_batch
from workbench.prompt.ranges import shift


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def fresh(llama, **options):
    return workbench.open_engine("numba", llama, **options)


def long_prompt() -> Prompt:
    """Over three pages long, so that prefixes can be shared and pages mixed up."""
    prompt = random_prompt(0, 100)
    return prompt.replace(embedding_ranges=[(4, 9), (40, 49)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("spans", [[], [Span(), Span(attention="bidirectional")]], ids=["causal", "both ways"])
def test_a_sound_engine_passes_all(llama, dtype, spans):
    engine, chunked = (fresh(llama, dtype=dtype, max_prefill_token_num=number) for number in (512, 16))
    report = probe(engine, long_prompt().replace(spans=spans), chunked=chunked)
    assert [result.passed for result in report.results] == [True] * 10, str(report)
    assert report.passed


def test_the_reference_passes_too(llama):
    report = probe(workbench.open_engine("transformers", llama), long_prompt())
    assert report.passed, str(report)
    assert report["chunks"].passed is None


QUESTION_FAULTS = {
    "determinism": "random states",
    "used": "placeholders used",
    "identity": "scale missing",
    "placeholders": "placeholders leak",
    "position": "range -1",
    "causality": "sees the next token",
    "canary": "range +1",
    "batch": "crowded batch",
    "prefix cache": "stale prefix cache",
}


@pytest.mark.parametrize("name", QUESTION_FAULTS)
def test_each_question_finds_its_fault(llama, name):
    report = probe(FAULTS[QUESTION_FAULTS[name]].inject(fresh(llama)), long_prompt(), only=[name])
    assert report[name].passed is False, str(report)
    assert not report.passed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["determinism", "identity", "causality", "batch"])
def test_an_engine_that_rolls_dice_does_not_set_its_own_limit(llama, name, dtype):
    report = probe(random_states(fresh(llama, dtype=dtype), 3.0), long_prompt(), only=[name])
    assert report[name].passed is False, str(report)


def test_other_tokens_from_equal_states_are_no_agreement(llama, monkeypatch):
    """A fault in sampling that shows in a crowd only."""
    engine = fresh(llama)
    generate, lock, calls = engine.generate, threading.Lock(), []

    def spoilt(prompt, config=None):
        output = generate(prompt, config)
        with lock:
            calls.append(prompt)
            return output if len(calls) == 1 else replace(output, token_ids=[token + 1 for token in output.token_ids])

    monkeypatch.setattr(engine, "generate", spoilt)
    result = probe(engine, long_prompt(), only=["batch"])["batch"]
    assert result.passed is False
    assert "the same states, but different tokens" in result.evidence


def test_chunks_are_held_against_the_whole(llama):
    spoilt = change_batch(
        fresh(llama, max_prefill_token_num=16),
        lambda batch: setattr(batch, "key_stop", (batch.key_stop - 1).clamp(min=1)),
    )
    report = probe(fresh(llama), long_prompt(), only=["chunks"], chunked=spoilt)
    assert report["chunks"].passed is False, str(report)


def test_a_stale_cache_is_named(llama):
    report = probe(stale_prefix_cache(fresh(llama)), long_prompt(), only=["prefix cache"])
    assert "the first rows' state is served" in report["prefix cache"].evidence


def test_a_canary_says_where_it_was_seen(llama):
    prompt = long_prompt()
    moved = FaultyEngine(fresh(llama), lambda p: p.replace(embedding_ranges=shift(p.embedding_ranges, 3)))
    assert (
        "row 0 of item 0 shows at token 7, it belongs at 4" in probe(moved, prompt, only=["canary"])["canary"].evidence
    )


def test_what_cannot_be_asked_is_said(llama):
    rows = random_prompt().input_embeddings[0]
    start = Prompt([5] * 40, [rows], [(0, 5)])
    report = probe(fresh(llama), start, only=["causality"])
    assert report["causality"].passed is None
    assert "there is nothing before it" in report["causality"].evidence
    same = Prompt([5] * 40, [rows[:1].expand(5, -1).contiguous()], [(3, 8)])
    assert probe(fresh(llama), same, only=["position"])["position"].passed is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: {"prompt": Prompt([1, 2, 3])}, "no input_embeddings"),
        (lambda: {"prompt": random_prompt().replace(embedding_ranges=[(4, 9), (38, 47)])}, "leaves the prompt"),
        (lambda: {"prompt": random_prompt(), "only": ["unknown"]}, "no probe 'unknown'"),
    ],
)
def test_bad_input_is_named(llama, make, words):
    with pytest.raises((PromptError, ValueError), match=words):
        probe(fresh(llama), **make())


def test_limits_are_the_engines_own_rounding(llama):
    """In float32 a change of a millionth is rounding, of a thousandth is not."""
    subject = _Subject(fresh(llama), long_prompt(), None)
    assert 1e-7 < float(subject.limits.median()) < 1e-4
    assert not subject.changed(subject.base * (1 + 1e-8)).any()
    assert subject.changed(subject.base * (1 + 1e-3)).all()
    assert subject.changed(torch.full_like(subject.base, torch.nan)).all()


def test_every_probe_has_a_fault_that_it_finds():
    assert set(QUESTION_FAULTS) | {"chunks"} == set(PROBES)
