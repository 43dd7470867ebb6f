"""A run that is made again after a small change: tokens before the change keep their keys, values and states."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from ...progress import Progress
from ...prompt import Prompt
from ...provenance import provenance_of
from ...trace import Trace
from ..api import TAPS
from . import sequence as requests
from .batch import Batch
from .engine import NumbaEngine


@dataclass
class _Kept:
    """What the last run left: what its tokens were computed from, and what came out."""

    hidden: torch.Tensor  # hidden state 0, [tokens, hidden]
    positions: torch.Tensor
    reach: torch.Tensor
    states: dict[str, torch.Tensor]


class WarmRun:
    """Traces of one prompt after another on a Numba engine; only what comes after the first change is computed.

    What is kept is one run: keys and values of all layers, and the residual stream. Results are those of `engine.trace` apart by
    rounding (products of other sizes round otherwise); tokens before the change are the same bits as in the run before.
    """

    def __init__(self, engine: NumbaEngine) -> None:
        self.engine = engine
        self.computed = 0
        """Tokens that the last trace ran through the layers."""
        self._kept: _Kept | None = None
        self._pages: object = None
        self._room = 0

    def trace(self, prompt: Prompt, progress: Progress | None = None) -> Trace:
        """The residual stream after every layer, the final norm, and logits of the last token only (`logits` is `[1, vocab]`).

        Raises:
            EmbeddingRangeError, PromptError, TraceError: as `engine.trace`; what is kept stays good.
        """
        engine = self.engine
        engine.check(prompt)
        plan = engine.plan_trace(prompt, TAPS[:-1])
        plan.check_room(psutil.virtual_memory().available // 2, "into half of the free memory", "")
        length, size, decoder = len(prompt), engine._page_size, engine.decoder
        sequence = requests.Sequence(prompt)
        now = _Kept(
            sequence.embed(decoder.table, 0, length),
            sequence.positions(0, length),
            torch.from_numpy(sequence.reach(0, length)),
            {},
        )
        start = 0 if prompt.deepstack else _same(now, self._kept)
        count = -(-length // size)
        if self._room < count:
            start, self._pages, self._room = 0, decoder.new_pages(count, size), count
        before, self._kept = self._kept, None  # a run that is stopped leaves nothing behind
        if before is not None and start == length:  # the last token's logits come from running it
            start = int(_begin(now.reach, length - 1))
        sequence.pages = list(range(count))
        layers = decoder.backbone.layers

        def tap(name: str, state: torch.Tensor) -> None:
            kind, _, rest = name.partition(".")
            if kind != "layers" or rest.isdecimal():
                old = before.states[name][:start] if before is not None and start else state[:0]
                now.states[name] = torch.cat([old, state.detach()])
                if progress:
                    progress(len(now.states) / (layers + 2))

        batch = Batch.of([(sequence, start, length)], decoder.table, size, bool(decoder.backbone.mrope))
        hidden = decoder.forward(batch, self._pages, tap)  # type: ignore[arg-type]
        self.computed = length - start
        if not prompt.deepstack:  # what is added after the first layers does not show in hidden state 0
            self._kept = now
        states = {name: state.cpu() for name, state in now.states.items()}
        states["logits"] = decoder.logits(hidden[-1:]).cpu()
        made = provenance_of(
            prompt, engine=engine.capabilities.name, model=engine.model, dtype=engine.dtype, device=engine.device,
            words=False,
        )  # fmt: skip
        return Trace(states, torch.arange(length), made)


def _same(now: _Kept, before: _Kept | None) -> int:
    """How many tokens from the first on have the same hidden states as before."""
    # Another length may turn positions by other angles (dynamic NTK), so it starts anew.
    if before is None or len(now.hidden) != len(before.hidden) or now.positions.shape != before.positions.shape:
        return 0
    changed = (now.hidden != before.hidden).any(dim=1).cpu() | (now.reach != before.reach)
    moved = now.positions != before.positions
    changed |= moved.any(dim=0) if moved.ndim == 2 else moved
    first = int(changed.int().argmax()) if changed.any() else len(changed)
    return _begin(now.reach, first)


def _begin(reach: torch.Tensor, first: int) -> int:
    """The first token that sees token `first` or a later one: tokens of a bidirectional stretch run together."""
    seeing = (reach[:first] >= first).nonzero()
    return _begin(reach, int(seeing[0])) if len(seeing) else first
