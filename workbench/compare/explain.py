"""Say in words what a wrong state is instead of what it should be: rows that moved, a scale, a mask, a weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..prompt import Prompt
from .metrics import cosine, relative_error, unit_roundoff

_ENOUGH = 0.9
"""A hypothesis must explain this share of the tokens that are wrong (a guess: one or two tokens may be wrong for two reasons)."""
_REACH = 64
"""Shifts of a range that are tried, in tokens to each side."""


@dataclass(frozen=True)
class Explanation:
    """What a fault looks like.

    Attributes:
        kind: a stable name: "shifted", "placeholders", "items", "reversed", "order", "memory", "scale", "stream", "positions",
            "mask", "weights", "residual", "head", "overflow", "unknown".
        sentence: the same in words, with numbers.
    """

    kind: str
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def explain_splice(
    prompt: Prompt, truth: torch.Tensor, state: torch.Tensor, wrong: torch.Tensor, own_rows: torch.Tensor, dtype: str
) -> Explanation:
    """What stands in hidden state 0 instead of what should.

    Args:
        truth, state: `[seq, hidden]`, all positions.
        wrong: bool `[seq]`.
        own_rows: `[seq, hidden]`, what the prompt's ids give when they are looked up.
    """
    tolerance = 16 * unit_roundoff(dtype)
    total = int(wrong.sum())

    def explains(expected: torch.Tensor) -> float:
        """Share of the wrong tokens that are what a hypothesis says."""
        return float((relative_error(state, expected)[wrong] <= tolerance).double().mean())

    best = max(_hypotheses(prompt, truth, own_rows), key=lambda pair: explains(pair[0]), default=None)
    if best is not None and explains(best[0]) >= _ENOUGH:
        return Explanation(best[1].kind, f"{best[1].sentence} ({total} tokens are wrong)")
    scaled = _scale(state[wrong], truth[wrong])
    if scaled is not None:
        return Explanation(
            "scale",
            f"the {total} wrong rows are the right ones times {scaled:.4g}: an embedding scale is missing or applied twice",
        )
    return _permuted(prompt, state, tolerance) or Explanation(
        "unknown", f"{total} rows of hidden state 0 are neither moved, exchanged nor scaled rows of this prompt"
    )


def _hypotheses(prompt: Prompt, truth: torch.Tensor, own: torch.Tensor) -> Iterator[tuple[torch.Tensor, Explanation]]:
    """Hidden states 0 of engines that go wrong in a known way."""
    ranges, length = prompt.embedding_ranges, len(prompt)
    items = [item.to(truth.dtype) for item in prompt.input_embeddings]
    for number, (start, stop) in enumerate(ranges):
        bare = truth.clone()
        bare[start:stop] = own[start:stop]
        yield (
            bare,
            Explanation(
                "placeholders", f"the rows of item {number} were not used: the placeholder tokens' own stand there"
            ),
        )
    yield own, Explanation("placeholders", "no injected row was used: the placeholder tokens' own stand there")
    for by in [by for distance in range(1, _REACH + 1) for by in (distance, -distance)]:
        if any(start + by < 0 or stop + by > length for start, stop in ranges):
            continue
        moved = own.clone()
        for item, (start, stop) in zip(items, ranges, strict=True):
            moved[start + by : stop + by] = item
        words = "late" if by > 0 else "early"
        off = "the range is off by one" if abs(by) == 1 else f"the ranges are off by {abs(by)}"
        yield moved, Explanation("shifted", f"every row stands {abs(by)} token{'s' * (abs(by) > 1)} too {words}: {off}")
    yield from _exchanged(items, ranges, truth, own)


def _exchanged(
    items: Sequence[torch.Tensor], ranges: Sequence[tuple[int, int]], truth: torch.Tensor, own: torch.Tensor
) -> Iterator[tuple[torch.Tensor, Explanation]]:
    def with_rows(changed: Sequence[torch.Tensor]) -> torch.Tensor:
        state = truth.clone()
        for item, (start, stop) in zip(changed, ranges, strict=True):
            state[start:stop] = item
        return state

    yield (
        with_rows([item.flip(0) for item in items]),
        Explanation("reversed", "the rows of every item stand in reverse order"),
    )
    yield (
        with_rows([item.t().reshape(item.shape) for item in items]),
        Explanation("memory", "the items' memory was read as [hidden, rows] instead of [rows, hidden]"),
    )
    for a in range(len(items)):
        for b in range(a + 1, len(items)):
            if len(items[a]) == len(items[b]):
                swapped = list(items)
                swapped[a], swapped[b] = items[b], items[a]
                yield with_rows(swapped), Explanation("items", f"items {a} and {b} stand in each other's place")
    if len(items) > 1:
        stream = torch.cat(list(items))
        for by in [by for distance in range(1, _REACH + 1) for by in (distance, -distance)]:
            rolled = stream.roll(by, 0)
            cut, at = [], 0
            for start, stop in ranges:
                cut.append(rolled[at : at + stop - start])
                at += stop - start
            if at == len(stream):
                yield (
                    with_rows(cut),
                    Explanation(
                        "stream",
                        f"rows run over from item to item by {abs(by)}: an item with a row too many or too few shifts all later",
                    ),
                )


def _permuted(prompt: Prompt, state: torch.Tensor, tolerance: float) -> Explanation | None:
    """Each row is some row of the same item: say which stands where."""
    for number, (item, (start, stop)) in enumerate(zip(prompt.input_embeddings, prompt.embedding_ranges, strict=True)):
        here = state[start:stop].double()
        rows = item.double()
        distances = torch.cdist(here, rows)
        nearest = distances.argmin(dim=1)
        close = distances.amin(dim=1) <= tolerance * rows.norm(dim=1)[nearest]
        order = nearest.tolist()
        if not close.all() or order == list(range(len(rows))):
            continue
        for height in range(2, len(rows) // 2 + 1):
            if len(rows) % height == 0:
                grid = torch.arange(len(rows)).reshape(height, -1)
                if order == grid.t().reshape(-1).tolist():
                    return Explanation(
                        "order",
                        f"the rows of item {number} are in column order: a {height} x {len(rows) // height} grid was transposed",
                    )
        first = next(row for row, found in enumerate(order) if found != row)
        return Explanation(
            "order", f"the rows of item {number} stand in another order: row {order[first]} where row {first} belongs"
        )
    return None


def _scale(state: torch.Tensor, truth: torch.Tensor) -> float | None:
    """The factor, where every row is the right one times the same number."""
    if not len(state) or not torch.isfinite(state).all() or float(cosine(state, truth).min()) < 0.999:
        return None
    factors = state.double().norm(dim=1) / truth.double().norm(dim=1)
    spread = float(factors.max() / factors.min() - 1)
    middle = float(factors.median())
    return middle if spread < 0.02 and abs(middle - 1) > 0.05 else None


def explain_tap(
    tap: str,
    truth: torch.Tensor,
    state: torch.Tensor,
    wrong: torch.Tensor,
    positions: torch.Tensor,
    spans: torch.Tensor,
    before: str | None,
) -> Explanation:
    """What the first wrong tap after the splice says about the cause.

    Args:
        truth, state: `[positions, width]`; wrong: bool, positions and spans: int64, `[positions]`.
        before: the tap that was compared before this one, which is right; None where there is none.
    """
    if not torch.isfinite(state[wrong]).all():
        return Explanation(
            "overflow",
            f"{tap} holds NaN or infinity at token {int(positions[wrong][0])}: an overflow, or memory nobody wrote",
        )
    where = _where(wrong, positions, spans)
    factor = _scale(state[wrong], truth[wrong])
    if factor is not None:
        return Explanation("scale", f"{tap} is the right state times {factor:.4g} at {where}")
    part = tap.rsplit(".", 1)[-1]
    if not _leads_to(before, tap):
        right = f"{before} is right" if before else "nothing before it was compared"
        more = (
            ""
            if tap.startswith("depth.")
            else "; compare with --taps embed 'layers.*' 'layers.*.*' norm logits to see which part"
        )
        return Explanation("unknown", f"wrong from {tap} on, at {where}; {right}{more}")
    if tap == "logits":
        return _explain_head(truth, state, where)
    if tap == "norm":
        return Explanation(
            "weights",
            f"the last layer is right and the state after the final norm is wrong at {where}: its weight or epsilon",
        )
    if part == "mlp":
        return Explanation(
            "weights",
            f"what this MLP adds is wrong at {where}, what goes in is right: its norm, its weights or its activation",
        )
    if part != "attention":
        return Explanation(
            "residual", f"attention and MLP of {tap} are right and their sum is wrong at {where}: the residual addition"
        )
    return _explain_attention(wrong, positions, spans, where)


def _leads_to(before: str | None, tap: str) -> bool:
    """Whether `before` is the last tap in front of `tap`, so that a fault between them lies in one part of the model."""
    parts = tap.split(".")
    if parts[0] == "layers":
        number = int(parts[1])
        chain = [
            f"layers.{number - 1}" if number else "embed",
            *(f"layers.{number}{part}" for part in (".attention", ".mlp", "")),
        ]
        return before == chain[chain.index(tap) - 1]
    if tap == "norm":
        return before is not None and before.startswith("layers.") and before.count(".") == 1
    return tap == "logits" and before == "norm"


def _explain_attention(wrong: torch.Tensor, positions: torch.Tensor, spans: torch.Tensor, where: str) -> Explanation:
    bad = set(positions[wrong].tolist())
    if 0 in bad:  # token 0 sees itself alone: no angle is wrong there
        return Explanation(
            "weights",
            f"attention is wrong at {where}, the first token included, which should see only itself: values, output projection, norm or their weights, or a mask that shows it more",
        )
    inside = spans >= 0
    if inside.any() and not (wrong & ~inside & (positions < positions[inside].min())).any():
        only = (wrong & inside).any() and not (wrong & ~inside).any()
        if only:
            return Explanation(
                "mask",
                f"attention is wrong at {where} and nowhere else: tokens of a span see other keys than they should (causal instead of both ways, or a reach that ends early)",
            )
    first = min(bad)
    if len(bad) >= _ENOUGH * int((positions >= first).sum()) and first <= 2:
        return Explanation(
            "positions",
            f"attention is wrong at {where}, all but the first token: rotary angles, query or key weights, the scale of the scores, or the map from query to key heads",
        )
    return Explanation(
        "mask",
        f"attention is wrong at {where}, earlier tokens are right: positions from there on, the mask, a window, or a page of the KV cache",
    )


def _explain_head(truth: torch.Tensor, state: torch.Tensor, where: str) -> Explanation:
    ranks = [logits.argsort(dim=-1).argsort(dim=-1) for logits in (truth, state)]
    same_order = int((ranks[0] - ranks[1]).abs().max()) <= max(
        2, truth.shape[-1] // 500
    )  # rounding exchanges neighbours
    larger = float(state.double().abs().amax() / truth.double().abs().amax())
    if same_order and larger > 1.02:
        return Explanation(
            "head",
            f"logits keep their order and are up to {larger:.3g} times as large at {where}: a softcap was dropped",
        )
    if same_order and larger < 0.98:
        return Explanation(
            "head",
            f"logits keep their order and are squeezed to {larger:.3g} at {where}: a softcap that does not belong there",
        )
    return Explanation(
        "head", f"the last hidden state is right and the logits are wrong at {where}: the head's weights"
    )


def _where(wrong: torch.Tensor, positions: torch.Tensor, spans: torch.Tensor) -> str:
    count, total = int(wrong.sum()), len(positions)
    first = int(positions[wrong][0])
    if count == total:
        return f"all {total} tokens"
    held = sorted({int(span) for span in spans[wrong].tolist() if span >= 0})
    inside = (
        f", all in span{'s' * (len(held) > 1)} {', '.join(map(str, held))}"
        if held and (spans[wrong] >= 0).all()
        else ""
    )
    return f"{count} of {total} tokens from {first} on{inside}"
