"""Rerun a prompt after a small change: tokens before the change keep their keys, values and states."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from ...progress import Progress
from ...prompt import Prompt
from ...trace import Trace
from ...trace.provenance import provenance_of
from ..base import TAPS
from .engine import NumbaEngine
from .model_cache import ModelCache
from .model_runner import Chunk
from .request import Request


@dataclass
class _Kept:
    """The last run: what its tokens were computed from, and the resulting states."""

    hidden: torch.Tensor  # hidden state 0, [tokens, hidden]
    positions: torch.Tensor
    key_stop: torch.Tensor
    states: dict[str, torch.Tensor]
    valid: int = 0
    """The leading tokens whose keys, values and states are those of `hidden`; fewer than all after a run that was stopped."""


class IncrementalTrace:
    """Traces one prompt after another on a Numba engine; only tokens from the first difference to the previous prompt on are computed.

    Models with linear attention are computed as a whole each time. Keys and values of all layers and the residual stream of the last
    run are kept in memory. Results equal those of `engine.trace` up to rounding (matrix products of other sizes round differently);
    tokens before the change are bit-identical to the previous run. Not thread-safe.
    """

    def __init__(self, engine: NumbaEngine) -> None:
        self.engine = engine
        self.computed = 0
        """Tokens that the last trace ran through the layers."""
        self._kept: _Kept | None = None
        self._pages: ModelCache | None = None

    def trace(self, prompt: Prompt, progress: Progress | None = None) -> Trace:
        """Trace `embed`, `layers.*` and `norm` for all tokens, and `logits` for the last token only (`[1, vocab]`).

        The next run writes its states over those of this trace, from the first token that it computes again: half the memory.

        Args:
            progress: called with the fraction of taps done. If it raises, the run stops, and the tokens that it did not compute again are
                kept for the next one.

        Raises:
            EmbeddingRangeError, PromptError, TraceError: as in `engine.trace`; the previous run stays usable.
        """
        engine = self.engine
        engine.check(prompt)
        plan = engine.plan_trace(prompt, TAPS[:-1])
        plan.check_room(psutil.virtual_memory().available // 2, "into half of the free memory", "")
        length, size, decoder = len(prompt), engine._page_size, engine.decoder
        request = Request(prompt)
        now = _Kept(
            request.embed(decoder.table, 0, length),
            request.positions(0, length),
            torch.from_numpy(request.key_stop(0, length)),
            {},
        )
        # Deepstack features are not part of hidden state 0, and linear attention keeps its last state only.
        again = bool(prompt.deepstack) or decoder.config.delta_net is not None
        start = 0 if again else _same(now, self._kept)
        count = -(-length // size)
        pages = self._pages
        if pages is None or pages.pages < count:
            start, pages = 0, decoder.new_pages(count, size)
            self._pages = pages
        before, self._kept = self._kept, None
        if before is not None and start == length:  # the last token must run, for its logits
            start = int(_first_affected(now.key_stop, length - 1))
        request.pages = list(range(count))
        layers = decoder.config.layers

        def tap(name: str, state: torch.Tensor) -> None:
            kind, _, rest = name.partition(".")
            if kind != "layers" or rest.isdecimal():
                now.states[name] = state.detach() if before is None or not start else before.states[name]
                if start:
                    now.states[name][start:] = state
                if progress:
                    progress(len(now.states) / (layers + 2))

        try:
            hidden = engine.runner.forward([Chunk(request, start, length)], pages, tap)
        except BaseException:
            if (
                before is not None and start
            ):  # the stopped run has overwritten, in some layers, what comes after `start`
                before.valid, self._kept = start, before
            raise
        self.computed = length - start
        if not again:
            now.valid, self._kept = length, now
        states = {name: state.cpu() for name, state in now.states.items()}
        states["logits"] = decoder.logits(hidden[-1:]).cpu()
        provenance = provenance_of(
            prompt, engine=engine.capabilities.name, model=engine.model, dtype=engine.dtype, device=engine.device,
            words=False,
        )  # fmt: skip
        return Trace(states, torch.arange(length), provenance)


def _same(now: _Kept, before: _Kept | None) -> int:
    """The number of leading tokens whose hidden states are the same as before."""
    # If the length differs, rotary frequencies may differ (dynamic NTK), so all tokens are computed again.
    if before is None or len(now.hidden) != len(before.hidden) or now.positions.shape != before.positions.shape:
        return 0
    changed = (now.hidden != before.hidden).any(dim=1).cpu() | (now.key_stop != before.key_stop)
    moved = now.positions != before.positions
    changed |= moved.any(dim=0) if moved.ndim == 2 else moved
    changed[before.valid :] = True
    first = int(changed.int().argmax()) if changed.any() else len(changed)
    return _first_affected(now.key_stop, first)


def _first_affected(key_stop: torch.Tensor, changed: int) -> int:
    """The first token that attends to token `changed` or to a later one, which is possible inside a bidirectional range."""
    seeing = (key_stop[:changed] > changed).nonzero()
    return _first_affected(key_stop, int(seeing[0])) if len(seeing) else changed
