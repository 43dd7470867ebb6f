"""Whether the reference with streamed weights computes what it computes with all weights in memory, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

import workbench
from workbench.comparison import runs_together
from workbench.comparison.floor_runs import reference_runs
from workbench.comparison.reference_pass import ReferencePass
from workbench.comparison.reference_work import ReferenceRun
from workbench.engines.transformers import streamed_weights
from workbench.engines.transformers.reference import TransformersReference
from workbench.progress import Stopped

SMALL = {"_EXPERT_BYTES": 0, "_LARGE_TABLE": 0, "_SMALL": 0}
"""Limits with which small models take the ways of large ones: experts one at a time, only the rows that are looked up."""


def streaming_faults(model: workbench.Model, prompt: workbench.Prompt) -> Iterator[str]:
    """Where they differ: states in three dtypes, and the noise floor that is measured layer by layer.

    Raises:
        workbench.ModelError: the weights cannot be streamed.
    """
    with mock.patch.multiple(streamed_weights, **SMALL), mock.patch.object(runs_together, "TOGETHER_BYTES", -1):
        yield from _faults(model, prompt)


def _faults(model: workbench.Model, prompt: workbench.Prompt) -> Iterator[str]:
    engines = {}
    for dtype in ("float64", "float32", "bfloat16"):
        streamed = TransformersReference(model, dtype=dtype, streamed=True)
        try:
            whole = TransformersReference(model, dtype=dtype, streamed=False)
            taps = [tap for tap in whole.capabilities.taps if not tap.startswith("depth")]
            expected = whole.trace(prompt, taps)
        except workbench.ModelError:
            if dtype == "bfloat16":  # some classes mix dtypes
                continue
            raise
        if streamed.capabilities != whole.capabilities:
            yield f"{dtype} taps differ when streamed"
            continue
        found = streamed.trace(prompt, taps)
        yield from (f"{dtype} {tap} differs when streamed" for tap in taps if not _equal(found[tap], expected[tap]))
        engines[dtype] = streamed, whole
    taps = [tap for tap in engines["float64"][1].capabilities.taps if not tap.startswith("depth")]
    what = [ReferencePass(prompt, taps)]
    (alone,) = reference_runs(engines["float64"][1], engines["float32"][1], what)
    pair = engines["float64"][0], engines["float32"][0]
    yield from _differences(
        reference_runs(*pair, what, progress=lambda fraction: None)[0], alone, "when all runs go together"
    )
    with contextlib.suppress(Stopped):
        reference_runs(*pair, what, progress=_stop_halfway)
    yield from _differences(
        reference_runs(*pair, what, progress=lambda fraction: None)[0], alone, "after an interruption"
    )


def _stop_halfway(fraction: float) -> None:
    if fraction > 0.5:
        raise Stopped


def _differences(found: ReferenceRun, alone: ReferenceRun, when: str) -> Iterator[str]:
    yield from (f"{tap} differs {when}" for tap in alone.trace if not _equal(found.trace[tap], alone.trace[tap]))
    same = all(torch.equal(found.floor.errors[tap], error) for tap, error in alone.floor.errors.items())
    if not same or dict(found.floor.digests) != dict(alone.floor.digests):
        yield f"the noise floor differs {when}"
    if found.floor.expert_choices != alone.floor.expert_choices:
        yield f"undecided experts differ {when}"


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())
