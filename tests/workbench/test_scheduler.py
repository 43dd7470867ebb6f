"""The scheduler without an engine: what an invariant one shares and recomputes."""

import pytest

from workbench import GenerationConfig, Prompt
from workbench.engines.numba_engine.block_manager import BlockManager
from workbench.engines.numba_engine.request import Request
from workbench.engines.numba_engine.scheduler import Scheduler
from workbench.engines.sampling import GenerationState

PAGE = 32


def request(ids):
    prompt = Prompt(ids)
    return Request(prompt, GenerationState(prompt, GenerationConfig(max_new_tokens=100, ignore_eos=True), frozenset()))


def run(scheduler, count=1):
    """Advance `count` steps; every request whose last token ran gets another one. Returns the chunks of the last step."""
    for _ in range(count):
        chunks = scheduler.schedule()
        for chunk in chunks:
            scheduler.advance(chunk)
            if chunk.last:
                chunk.request.append_token(7)
    return [(chunk.request, chunk.start, chunk.stop) for chunk in chunks]


@pytest.mark.parametrize("invariant", [False, True])
def test_generated_tokens_are_computed_one_by_one_after_a_preemption(invariant):
    """B's prompt is A's text so far. If A is preempted, its generated tokens may not come from B's pages, nor from one prefill."""
    scheduler = Scheduler(BlockManager(64), PAGE, 4, 512, invariant=invariant)
    a = request(list(range(3, 43)))
    scheduler.add(a)
    run(scheduler, 61)
    assert len(a) == 40 + 61
    b = request([*range(3, 43), *[7] * 61])
    scheduler.add(b)
    run(scheduler)
    assert b.cached == (
        PAGE if invariant else 3 * PAGE
    )  # pages with generated tokens are shared only if that may change bits
    scheduler._preempt(a)
    ((again, start, stop),) = [each for each in run(scheduler) if each[0] is a]
    if not invariant:
        assert (start, stop) == (3 * PAGE, len(again) - 1)
        return
    assert (start, stop) == (PAGE, 40)
    for computed in range(40, 60):
        ((_, start, stop),) = [each for each in run(scheduler) if each[0] is a]
        assert (start, stop) == (computed, computed + 1)
