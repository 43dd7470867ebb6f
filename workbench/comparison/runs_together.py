"""Runs that go through the layers of streamed weights together: each layer is read once for all of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..engines.transformers.lockstep import Lockstep
from ..engines.transformers.reference import TransformersReference
from ..engines.transformers.streamed_weights import StreamedWeights
from ..errors import ModelError
from ..progress import Progress
from .reference_work import EXACT, ReferenceWork
from .stream_plan import StreamPlan
from .unfinished_runs import UnfinishedRuns

TOGETHER_BYTES = 2 << 30
"""If a checkpoint is larger, runs go through it together. A smaller one is in the page cache, and the runs are faster one by one."""


def reads_together(exact: TransformersReference, rounded: TransformersReference) -> bool:
    """Whether the runs of these two read their weights together."""
    if exact.streamed is None or rounded.streamed is None:
        return False
    return exact.streamed.stored_bytes > TOGETHER_BYTES


def run_together(
    exact: TransformersReference,
    rounded: TransformersReference,
    works: Sequence[ReferenceWork],
    progress: Progress | None,
    folder: Path | None,
) -> None:
    """Make all runs. What is done is kept layer by layer (`unfinished_runs.py`); without `progress`, the plan is
    printed, and a bar shows how far they are.

    Raises:
        ModelError: weights cannot be read; the message names the layer.
        TraceError: `folder` has runs of something else.
    """
    assert exact.streamed is not None
    assert rounded.streamed is not None
    weights = [exact.streamed, rounded.streamed]
    tokens = sum(work.tokens for work in works)
    if progress is None:
        print(StreamPlan.of(exact, rounded, tokens), file=sys.stderr)
    unfinished = UnfinishedRuns({"works": [work.what for work in works]}, folder)
    with contextlib.ExitStack() as files:
        for engine, own in zip((exact, rounded), weights, strict=True):  # all passes share the memory of a layer
            files.enter_context(engine.exclusive())
            files.callback(own.forget)
        if any(tap.startswith("depth.") for work in works for tap in work.taps):
            for engine in (exact, rounded):
                engine.check_final_norm()  # by a pass of its own, before layers are left out
        for work in works:
            files.enter_context(work.writing())
        report = _Report(weights[0], progress, files)
        kept = unfinished.load()
        if kept is not None:
            _go_on(works, *kept)
            report.skip(works[0].complete)
        # In each round the float64 runs come first: the others are compared with their states.
        jobs = sorted(((work, job) for work in works for job in work.jobs), key=lambda each: each[1] != EXACT)
        passes = [partial(work.run_job, job, exact, rounded) for work, job in jobs]
        done = _UnitDone(weights, works, unfinished, report)
        try:
            Lockstep(done).run(passes)
        except ModelError as error:
            kept_layers = done.save()
            where = f" The {kept_layers} layers done are kept: the same call goes on after them" if kept_layers else ""
            raise ModelError(f"{error}{where}") from error
        except BaseException:
            done.save()
            raise
    unfinished.remove()


def _go_on(works: Sequence[ReferenceWork], tensors: Any, taps: Any, rest: Any) -> None:
    for number, work in enumerate(works):
        own = f"{number} "
        work.go_on(
            {name.removeprefix(own): each for name, each in tensors.items() if name.startswith(own)},
            {name.removeprefix(own): each for name, each in taps.items() if name.startswith(own)},
            rest["works"][number],
        )


class _UnitDone:
    """What happens after all runs have gone through a layer: its weights are dropped, and at times the states are written."""

    def __init__(
        self,
        weights: Sequence[StreamedWeights],
        works: Sequence[ReferenceWork],
        unfinished: UnfinishedRuns,
        report: _Report,
    ) -> None:
        self._weights, self._works, self._unfinished, self._report = weights, works, unfinished, report
        self._kept = works[0].complete

    def __call__(self, unit: str) -> None:
        for each in self._weights:
            each.drop(unit)
        for work in self._works:
            work.layer_done()
        if self._unfinished.due:
            self.save()
        self._report.done(unit)

    def save(self) -> int:
        """Keep what is done; return the number of layers that the next call need not run."""
        if not all(work.resumable for work in self._works) or len({work.complete for work in self._works}) > 1:
            return 0
        if self._works[0].complete == self._kept:  # nothing new; runs that have just gone on may not have begun
            return self._kept
        states: dict[str, torch.Tensor] = {}
        taps: dict[str, torch.Tensor] = {}
        rests = []
        for number, work in enumerate(self._works):
            own_states, own_taps, rest = work.save()
            states |= {f"{number} {name}": each for name, each in own_states.items()}
            taps |= {f"{number} {name}": each for name, each in own_taps.items()}
            rests.append(rest)
        if not self._unfinished.save(states, taps, {"works": rests}):
            return 0
        self._kept = self._works[0].complete
        return self._kept


class _Report:
    """Tells how many bytes of the weights were read: a callback, or else a bar with the layer and the time left."""

    def __init__(self, weights: StreamedWeights, progress: Progress | None, resources: contextlib.ExitStack) -> None:
        self._weights, self._progress = weights, progress
        self._total, self._read = max(weights.stored_bytes, 1), 0
        bar = tqdm(total=self._total, unit="B", unit_scale=True, disable=progress is not None, leave=False)
        self._bar = resources.enter_context(contextlib.closing(bar))

    def skip(self, layers: int) -> None:
        """Count layers that were run before an interruption."""
        skipped = sum(self._weights.unit_bytes(unit) for unit in self._weights.layer_units[:layers])
        self._read += skipped
        self._bar.update(skipped)

    def done(self, unit: str) -> None:
        size = self._weights.unit_bytes(unit)
        self._read += size
        self._bar.set_description(unit, refresh=False)
        self._bar.update(size)
        if self._progress is not None:
            self._progress(min(self._read / self._total, 1.0))
