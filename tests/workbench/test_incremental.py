"""Incremental traces: after a change only the tokens from there on are recomputed, and the result equals a full run."""

import pytest
import torch

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench import Prompt, Span
from workbench.engines.numba_engine.incremental import IncrementalTrace
from workbench.progress import Stopped

TAPS = ("embed", "layers.*", "norm", "logits")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return workbench.open_engine("numba", save_llama(tmp_path_factory.mktemp("llama")))


def check(engine, run, prompt, computed):
    """Compare `run.trace` with a full run, and check how many tokens it computed."""
    whole, warm = engine.trace(prompt, TAPS), run.trace(prompt)
    assert list(warm) == list(whole)
    for tap in whole:
        expected = whole[tap][-1:] if tap == "logits" else whole[tap]
        assert warm[tap].shape == expected.shape
        assert (warm[tap] - expected).norm() <= 2e-6 * expected.norm(), tap
    assert warm.provenance["prompt"] == prompt.digest
    assert run.computed == computed
    return warm


def test_only_tokens_after_a_change_are_recomputed(engine):
    run, prompt = IncrementalTrace(engine), random_prompt()
    first = check(engine, run, prompt, 40)
    moved = prompt.replace(embedding_ranges=[(4, 9), (22, 31)])
    after = check(engine, run, moved, 20)  # token 20 is the first that differs
    assert torch.equal(after["layers.1"][:20], first["layers.1"][:20])
    check(engine, run, moved, 1)  # nothing differs: only the last token runs, for its logits
    other = moved.replace(input_embeddings=[moved.input_embeddings[0], moved.input_embeddings[1] * 2])
    check(engine, run, other, 18)
    ids = list(other.input_ids)
    ids[2] = 5
    check(engine, run, other.replace(input_ids=ids), 38)
    check(engine, run, random_prompt(1, 60), 60)  # another length
    check(engine, run, random_prompt(1, 60).replace(position_ids=torch.arange(60) + torch.arange(60).ge(50)), 10)


def test_bidirectional_span_is_recomputed_as_a_whole(engine):
    run = IncrementalTrace(engine)
    prompt = random_prompt().replace(spans=[Span(), Span(attention="bidirectional")])
    check(engine, run, prompt, 40)
    rows = prompt.input_embeddings[1].clone()
    rows[-1] += 1.0  # token 28, to which tokens 20 to 27 attend
    check(engine, run, prompt.replace(input_embeddings=[prompt.input_embeddings[0], rows]), 20)


def test_runs_with_deepstack_features_are_not_reused(engine):
    """Deepstack features are not part of hidden state 0, so such a run cannot be reused."""
    run, prompt = IncrementalTrace(engine), random_prompt()
    run._kept = None
    check(engine, run, prompt, 40)
    engine.check, check_prompt = (lambda prompt, new_tokens=0: None), engine.check
    try:
        check(engine, run, prompt.replace(deepstack=[torch.randn(1, rows, 48) for rows in (5, 9)]), 40)
        check(engine, run, prompt, 40)
    finally:
        engine.check = check_prompt


def test_run_after_a_stopped_or_refused_run_is_correct(engine):
    run, prompt = IncrementalTrace(engine), random_prompt()
    check(engine, run, prompt, 40)
    with pytest.raises(workbench.EmbeddingRangeError, match="overlaps"):
        run.trace(prompt.replace(embedding_ranges=[(4, 9), (8, 17)]))
    moved = prompt.replace(embedding_ranges=[(4, 9), (21, 30)])
    shares = []

    def stop(share):
        shares.append(share)
        if share > 0.5:
            raise Stopped

    with pytest.raises(Stopped):
        run.trace(moved, stop)
    assert shares == sorted(shares)
    check(engine, run, moved, 20)  # half of the layers had the new keys from token 20 on; what comes before is kept
    with pytest.raises(Stopped):
        run.trace(prompt.replace(embedding_ranges=[(2, 7), (21, 30)]), stop)
    check(engine, run, moved, 38)  # the stopped run had reached back to token 2


def test_progress_rises_to_one_in_traces_and_checks(engine):
    prompt, shares = random_prompt(), []
    engine.trace(prompt, TAPS, progress=shares.append)
    assert shares[-1] == 1.0
    assert shares == sorted(shares)
    shares.clear()
    workbench.check_engine(engine, prompt, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    with pytest.raises(Stopped):
        engine.trace(prompt, TAPS, progress=lambda share: (_ for _ in ()).throw(Stopped()))


def test_logit_lens_of_final_states_equals_the_logits(engine):
    reference = workbench.open_engine("transformers", engine.model, dtype="float64")
    trace = engine.trace(Prompt([5, 6, 7, 8]), TAPS)
    for given in (engine, reference):
        for tap, normed in (("layers.2", False), ("norm", True)):
            logits = given.logit_lens(trace[tap], normed=normed)
            assert (logits.double() - trace["logits"].double()).norm() <= 1e-5 * trace["logits"].double().norm()
