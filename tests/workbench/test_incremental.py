"""A run that is made again after a change computes only what comes after it, and gives what a whole run gives."""

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
    """`run.trace` beside a whole run; how many tokens it computed."""
    whole, warm = engine.trace(prompt, TAPS), run.trace(prompt)
    assert list(warm) == list(whole)
    for tap in whole:
        expected = whole[tap][-1:] if tap == "logits" else whole[tap]
        assert warm[tap].shape == expected.shape
        assert (warm[tap] - expected).norm() <= 2e-6 * expected.norm(), tap
    assert warm.provenance["prompt"] == prompt.digest
    assert run.computed == computed
    return warm


def test_only_what_comes_after_the_change_is_computed(engine):
    run, prompt = IncrementalTrace(engine), random_prompt()
    first = check(engine, run, prompt, 40)
    moved = prompt.replace(embedding_ranges=[(4, 9), (22, 31)])
    after = check(engine, run, moved, 20)  # token 20 is the first that differs
    assert torch.equal(after["layers.1"][:20], first["layers.1"][:20])
    check(engine, run, moved, 1)  # nothing differs: the last token gives its logits
    other = moved.replace(input_embeddings=[moved.input_embeddings[0], moved.input_embeddings[1] * 2])
    check(engine, run, other, 18)
    ids = list(other.input_ids)
    ids[2] = 5
    check(engine, run, other.replace(input_ids=ids), 38)
    check(engine, run, random_prompt(1, 60), 60)  # another length
    check(engine, run, random_prompt(1, 60).replace(position_ids=torch.arange(60) + torch.arange(60).ge(50)), 10)


def test_a_stretch_that_sees_both_ways_runs_whole(engine):
    run = IncrementalTrace(engine)
    prompt = random_prompt().replace(spans=[Span(), Span(attention="bidirectional")])
    check(engine, run, prompt, 40)
    rows = prompt.input_embeddings[1].clone()
    rows[-1] += 1.0  # token 28, which tokens 20 to 27 see
    check(engine, run, prompt.replace(input_embeddings=[prompt.input_embeddings[0], rows]), 20)


def test_features_of_early_layers_are_seen(engine):
    """Deepstack features do not show in hidden state 0: such a run leaves nothing to start from."""
    run, prompt = IncrementalTrace(engine), random_prompt()
    run._kept = None
    check(engine, run, prompt, 40)
    engine.check, check_prompt = (lambda prompt, new_tokens=0: None), engine.check
    try:
        check(engine, run, prompt.replace(deepstack=[torch.randn(1, rows, 48) for rows in (5, 9)]), 40)
        check(engine, run, prompt, 40)
    finally:
        engine.check = check_prompt


def test_a_stopped_or_refused_run_does_no_harm(engine):
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
    check(engine, run, moved, 40)  # half of the layers had the new keys, so it starts anew


def test_progress_of_traces_and_checks(engine):
    prompt, told = random_prompt(), []
    engine.trace(prompt, TAPS, progress=told.append)
    assert told[-1] == 1.0
    assert told == sorted(told)
    told.clear()
    workbench.check_engine(engine, prompt, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)
    with pytest.raises(Stopped):
        engine.trace(prompt, TAPS, progress=lambda share: (_ for _ in ()).throw(Stopped()))


def test_lens_reads_states_through_the_head(engine):
    reference = workbench.open_engine("transformers", engine.model, dtype="float64")
    trace = engine.trace(Prompt([5, 6, 7, 8]), TAPS)
    for given in (engine, reference):
        for tap, normed in (("layers.2", False), ("norm", True)):
            logits = given.logit_lens(trace[tap], normed=normed)
            assert (logits.double() - trace["logits"].double()).norm() <= 1e-5 * trace["logits"].double().norm()
