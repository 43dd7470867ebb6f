"""Probes: a correct engine passes all of them, and each probe fails on an engine with a matching fault."""

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
    """Longer than three pages, so that prefixes can be shared and pages confused."""
    prompt = random_prompt(0, 100)
    return prompt.replace(embedding_ranges=[(4, 9), (40, 49)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("spans", [[], [Span(), Span(attention="bidirectional")]], ids=["causal", "both ways"])
def test_correct_engine_passes_every_probe(llama, dtype, spans):
    engine, chunked = (fresh(llama, dtype=dtype, max_prefill_token_num=number) for number in (512, 16))
    report = probe(engine, long_prompt().replace(spans=spans), chunked=chunked)
    assert [result.passed for result in report.results] == [True] * 12, str(report)
    assert report.passed


def test_reference_passes_every_probe(llama):
    report = probe(workbench.open_engine("transformers", llama), long_prompt())
    assert report.passed, str(report)
    assert report["chunks"].passed is None


PROBE_FAULTS = {
    "determinism": "random states",
    "used": "placeholders used",
    "identity": "scale missing",
    "placeholders": "placeholders leak",
    "position": "range -1",
    "causality": "sees the next token",
    "canary": "range +1",
    "batch": "crowded batch",
    "decode": "decode position",
    "nan": "NaN stays",
    "prefix cache": "stale prefix cache",
}


@pytest.mark.parametrize("name", PROBE_FAULTS)
def test_each_probe_finds_its_fault(llama, name):
    report = probe(FAULTS[PROBE_FAULTS[name]].inject(fresh(llama)), long_prompt(), only=[name])
    assert report[name].passed is False, str(report)
    assert not report.passed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["determinism", "identity", "causality", "batch"])
def test_nondeterministic_engine_does_not_raise_its_own_limit(llama, name, dtype):
    report = probe(random_states(fresh(llama, dtype=dtype), 3.0), long_prompt(), only=[name])
    assert report[name].passed is False, str(report)


def test_different_tokens_from_equal_states_fail_the_batch_probe(llama, monkeypatch):
    """A sampling fault that appears only if several requests run."""
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


def test_chunks_probe_finds_a_fault_in_chunked_prefill(llama):
    spoilt = change_batch(
        fresh(llama, max_prefill_token_num=16),
        lambda batch: setattr(batch, "key_stop", (batch.key_stop - 1).clamp(min=1)),
    )
    report = probe(fresh(llama), long_prompt(), only=["chunks"], chunked=spoilt)
    assert report["chunks"].passed is False, str(report)


def test_evidence_names_a_stale_prefix_cache(llama):
    report = probe(stale_prefix_cache(fresh(llama)), long_prompt(), only=["prefix cache"])
    assert "the first rows' state is served" in report["prefix cache"].evidence


def test_canary_evidence_contains_the_position_of_the_row(llama):
    prompt = long_prompt()
    moved = FaultyEngine(fresh(llama), lambda p: p.replace(embedding_ranges=shift(p.embedding_ranges, 3)))
    assert (
        "row 0 of item 0 shows at token 7, it belongs at 4" in probe(moved, prompt, only=["canary"])["canary"].evidence
    )


def test_probes_that_do_not_apply_give_a_reason(llama):
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
def test_bad_input_is_refused_by_name(llama, make, words):
    with pytest.raises((PromptError, ValueError), match=words):
        probe(fresh(llama), **make())


def test_limits_match_the_rounding_of_the_engine(llama):
    """In float32 a relative change of 1e-8 counts as rounding, one of 1e-3 does not."""
    subject = _Subject(fresh(llama), long_prompt(), None)
    assert 1e-7 < float(subject.limits.median()) < 1e-4
    assert not subject.changed(subject.base * (1 + 1e-8)).any()
    assert subject.changed(subject.base * (1 + 1e-3)).all()
    assert subject.changed(torch.full_like(subject.base, torch.nan)).all()


def test_every_probe_is_tested_with_a_fault():
    assert set(PROBE_FAULTS) | {"chunks"} == set(PROBES)
