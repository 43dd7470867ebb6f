"""Diagnose wrong hidden states: find the likely cause (moved rows, a missing scale, a mask, a weight) and put it into words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..models import Model
from ..prompt import Prompt
from ..trace import Trace
from .metrics import cosine, relative_error, unit_roundoff
from .verdict import Comparison

_MIN_SHARE = 0.9
"""A hypothesis must explain this share of the wrong tokens (a guess; a few tokens may be wrong for another reason as well)."""
_MAX_SHIFT = 64
"""The largest shift of a range that is tried in either direction, in tokens."""


@dataclass(frozen=True)
class Explanation:
    """The diagnosis of a wrong state.

    Attributes:
        kind: a stable name: "shifted", "placeholders", "items", "reversed", "order", "memory", "scale", "stream", "positions",
            "mask", "weights", "residual", "head", "overflow", "drift", "deepstack", "unknown".
        sentence: the diagnosis in words, with numbers.
    """

    kind: str
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def explain(
    comparison: Comparison, reference: Trace, state: Trace, prompt: Prompt | None = None, model: Model | None = None
) -> Explanation | None:
    """Diagnose the first wrong tap (named hidden state) of a comparison; None if nothing is wrong.

    Args:
        comparison: of the two traces that follow.
        reference: the reference's float64 trace.
        state: the engine's trace.
        prompt, model: with both, and traces of all positions, misplaced rows in hidden state 0 are identified.
    """
    found = comparison.first_divergence
    if found is None:
        return None
    if comparison.drift is not None:
        return Explanation("drift", str(comparison.drift))
    at = comparison.taps.index(found.tap)
    wrong, positions = comparison.wrong[at], comparison.positions
    expected, given = reference[found.tap], state[found.tap]
    whole = prompt is not None and len(positions) == len(prompt) and bool(prompt.input_embeddings)
    if found.tap == "embed":
        if not whole or prompt is None or model is None:
            return Explanation(
                "unknown",
                "hidden state 0 is already wrong: the splice. Compare all positions, with prompt and model, to identify its rows",
            )
        own = model.token_rows(prompt.lookup_ids if _placeholders_unknown(prompt, model) else prompt.input_ids)
        return explain_splice(prompt, expected, given, wrong, own.to(expected), comparison.dtype)
    before = comparison.taps[at - 1] if at else None
    if whole and prompt is not None and prompt.deepstack:
        told = explain_deepstack(found.tap, prompt, state, comparison.dtype)
        if told is not None:
            return told
    return explain_tap(found.tap, expected, given, wrong, positions, comparison.spans, before)


def explain_splice(
    prompt: Prompt,
    reference: torch.Tensor,
    state: torch.Tensor,
    wrong: torch.Tensor,
    own_rows: torch.Tensor,
    dtype: str,
) -> Explanation:
    """Diagnose a wrong hidden state 0 (the embeddings after the splice): find out which rows it has instead of the right ones.

    Args:
        reference, state: hidden state 0 of reference and engine, `[seq, hidden]`, all positions.
        wrong: bool `[seq]`, the tokens whose error exceeds rounding.
        own_rows: `[seq, hidden]`, the looked-up embeddings of the prompt's ids.
        dtype: the engine's, by name.
    """
    tolerance = 16 * unit_roundoff(dtype)
    total = int(wrong.sum())
    factor = _embedding_factor(prompt, reference)
    own_rows = own_rows * factor
    prompt = prompt.replace(input_embeddings=[item.double() * factor for item in prompt.input_embeddings])

    def explains(expected: torch.Tensor) -> float:
        """Share of the wrong tokens at which the engine's state equals that of a hypothesis."""
        return float((relative_error(state, expected)[wrong] <= tolerance).double().mean())

    best = max(_hypotheses(prompt, reference, own_rows), key=lambda pair: explains(pair[0]), default=None)
    if best is not None and explains(best[0]) >= _MIN_SHARE:
        return Explanation(best[1].kind, f"{best[1].sentence} ({total} tokens are wrong)")
    scaled = _scale(state[wrong], reference[wrong])
    if scaled is not None:
        return Explanation(
            "scale",
            f"the {total} wrong rows are {scaled:.4g} times the right ones: an embedding scale is missing or applied twice",
        )
    return _permuted(prompt, state, tolerance) or Explanation(
        "unknown", f"{total} rows of hidden state 0 are wrong, but not moved, exchanged or scaled rows of this prompt"
    )


def _embedding_factor(prompt: Prompt, reference: torch.Tensor) -> float:
    """The factor by which the model multiplies all embeddings before the first layer, injected ones as well (Granite: 12)."""
    rows = torch.cat([item.double() for item in prompt.input_embeddings])
    entered = torch.cat([reference[start:stop].double() for start, stop in prompt.embedding_ranges])
    factor = float((rows * entered).sum() / rows.square().sum().clamp(min=1e-300))
    return factor if float((entered - factor * rows).norm()) <= 1e-6 * float(entered.norm()) else 1.0


def _hypotheses(
    prompt: Prompt, reference: torch.Tensor, own: torch.Tensor
) -> Iterator[tuple[torch.Tensor, Explanation]]:
    """Yield hidden state 0 as each known splice fault produces it, with its explanation."""
    ranges, length = prompt.embedding_ranges, len(prompt)
    items = [item.to(reference.dtype) for item in prompt.input_embeddings]
    for number, (start, stop) in enumerate(ranges):
        bare = reference.clone()
        bare[start:stop] = own[start:stop]
        yield (
            bare,
            Explanation(
                "placeholders", f"the rows of item {number} were not used: the placeholder tokens' embeddings are there"
            ),
        )
    yield own, Explanation("placeholders", "no injected row was used: the placeholder tokens' embeddings are there")
    for by in [by for distance in range(1, _MAX_SHIFT + 1) for by in (distance, -distance)]:
        if any(start + by < 0 or stop + by > length for start, stop in ranges):
            continue
        moved = own.clone()
        for item, (start, stop) in zip(items, ranges, strict=True):
            moved[start + by : stop + by] = item
        words = "late" if by > 0 else "early"
        off = "the range is off by one" if abs(by) == 1 else f"the ranges are off by {abs(by)}"
        yield moved, Explanation("shifted", f"every row is {abs(by)} token{'s' * (abs(by) > 1)} too {words}: {off}")
    yield from _exchanged(items, ranges, reference, own)


def _exchanged(
    items: Sequence[torch.Tensor], ranges: Sequence[tuple[int, int]], reference: torch.Tensor, own: torch.Tensor
) -> Iterator[tuple[torch.Tensor, Explanation]]:
    def with_rows(changed: Sequence[torch.Tensor]) -> torch.Tensor:
        state = reference.clone()
        for item, (start, stop) in zip(changed, ranges, strict=True):
            state[start:stop] = item
        return state

    yield (
        with_rows([item.flip(0) for item in items]),
        Explanation("reversed", "the rows of every item are in reverse order"),
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
                yield with_rows(swapped), Explanation("items", f"items {a} and {b} are exchanged")
    if len(items) > 1:
        stream = torch.cat(list(items))
        for by in [by for distance in range(1, _MAX_SHIFT + 1) for by in (distance, -distance)]:
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
                        f"rows are shifted across items by {abs(by)}: an item with too many or too few rows shifts all later rows",
                    ),
                )


def _permuted(prompt: Prompt, state: torch.Tensor, tolerance: float) -> Explanation | None:
    """Diagnose an item in which each row is some row of that item, but in another order."""
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
            "order", f"the rows of item {number} are in another order: row {order[first]} is where row {first} belongs"
        )
    return None


def explain_deepstack(tap: str, prompt: Prompt, state: Trace, dtype: str) -> Explanation | None:
    """Diagnose features that should have been added after the layer before `tap`; None if they were, or if the trace does not show it.

    What was added is what remains of the layer's output when its input, its attention and its MLP are taken away.
    """
    parts = tap.split(".")
    number = int(parts[1]) if parts[0] == "layers" else 0
    level = number - 1
    names = (f"layers.{number - 1}", f"layers.{number}.attention", f"layers.{number}.mlp", f"layers.{number}")
    wanted = torch.cat([item.double() for item in prompt.deepstack], dim=1)  # [levels, rows of all, hidden]
    if not 0 <= level < len(wanted) or any(name not in state for name in names):
        return None
    before, attention, mlp, after = (state[name].double() for name in names)
    inside = torch.cat([torch.arange(start, stop) for start, stop in prompt.embedding_ranges])
    remainder = after - attention - mlp - before
    outside = torch.ones(len(before), dtype=torch.bool)
    outside[inside] = False
    sizes = torch.stack([each.norm(dim=-1) for each in (before, attention, mlp, after)]).amax(dim=0)
    if bool((remainder.norm(dim=-1) > 16 * unit_roundoff(dtype) * sizes)[outside].any()):
        return None  # the layer does not sum up where nothing is added either: another fault
    added = remainder[inside]
    rounding = 16 * unit_roundoff(dtype) * sizes[inside]

    def equals(rows: torch.Tensor) -> bool:
        return float(((added - rows).norm(dim=-1) <= rounding).double().mean()) >= _MIN_SHARE

    right = wanted[level]
    if equals(right) or not torch.isfinite(added).all():
        return None
    layer, total = number - 1, len(right)
    if equals(torch.zeros_like(right)):
        return Explanation("deepstack", f"the deepstack features of {total} rows were not added after layer {layer}")
    for other in range(len(wanted)):
        if other != level and equals(wanted[other]):
            return Explanation(
                "deepstack",
                f"after layer {layer} the deepstack features of level {other} were added, not of level {level}",
            )
    items = [item[level].double() for item in prompt.deepstack]
    for first, second in ((a, b) for a in range(len(items)) for b in range(a)):
        if items[first].shape == items[second].shape:
            swapped = list(items)
            swapped[first], swapped[second] = items[second], items[first]
            if equals(torch.cat(swapped)):
                return Explanation(
                    "deepstack",
                    f"the deepstack features of items {second} and {first} are exchanged after layer {layer}",
                )
    for by in (by for distance in range(1, min(_MAX_SHIFT, total)) for by in (distance, -distance)):
        # inside each item, or from item to item
        if equals(torch.cat([item.roll(by, 0) for item in items])) or equals(right.roll(by, 0)):
            words = "late" if by > 0 else "early"
            rows = f"{abs(by)} row{'s' * (abs(by) > 1)}"
            return Explanation("deepstack", f"the deepstack features after layer {layer} are {rows} too {words}")
    if equals(torch.cat([item.flip(0) for item in items])):
        return Explanation("deepstack", f"the deepstack features after layer {layer} are in reverse order")
    factor = _scale(added, right)
    if factor is not None:
        return Explanation(
            "deepstack", f"the deepstack features after layer {layer} are {factor:.4g} times the right ones"
        )
    return Explanation(
        "deepstack", f"what was added to {total} rows after layer {layer} are not their deepstack features"
    )


def _scale(state: torch.Tensor, reference: torch.Tensor) -> float | None:
    """The factor, if all rows are the reference's rows times one factor that differs from 1 by more than 5 %; else None."""
    if not len(state) or not torch.isfinite(state).all() or float(cosine(state, reference).min()) < 0.999:
        return None
    factors = state.double().norm(dim=1) / reference.double().norm(dim=1)
    spread = float(factors.max() / factors.min() - 1)
    middle = float(factors.median())
    return middle if spread < 0.02 and abs(middle - 1) > 0.05 else None


def explain_tap(
    tap: str,
    reference: torch.Tensor,
    state: torch.Tensor,
    wrong: torch.Tensor,
    positions: torch.Tensor,
    spans: torch.Tensor,
    before: str | None,
) -> Explanation:
    """Diagnose the first wrong tap after the splice.

    Args:
        reference, state: the tap's states of reference and engine, `[positions, width]`.
        wrong: bool `[positions]`, the tokens whose error exceeds rounding.
        positions: int64 `[positions]`, prompt positions.
        spans: int64 `[positions]`, the embedding range of each position, -1 for text.
        before: the tap that was compared before this one and is right; None if this is the first.
    """
    if not torch.isfinite(state[wrong]).all():
        return Explanation(
            "overflow",
            f"{tap} contains NaN or infinity at token {int(positions[wrong][0])}: an overflow, or uninitialised memory",
        )
    where = _where(wrong, positions, spans)
    factor = _scale(state[wrong], reference[wrong])
    if factor is not None:
        return Explanation("scale", f"{tap} is {factor:.4g} times the right state at {where}")
    part = tap.rsplit(".", 1)[-1]
    if not _leads_to(before, tap):
        right = f"{before} is right" if before else "nothing before it was compared"
        more = (
            ""
            if tap.startswith("depth.")
            else "; compare with --taps embed 'layers.*' 'layers.*.*' norm logits to find the wrong part"
        )
        return Explanation("unknown", f"wrong from {tap} on, at {where}; {right}{more}")
    if tap == "logits":
        return _explain_head(reference, state, where)
    if tap == "norm":
        return Explanation(
            "weights",
            f"the last layer is right and the state after the final norm is wrong at {where}: the norm's weight or epsilon",
        )
    if part == "mlp":
        return Explanation(
            "weights",
            f"the output of this MLP is wrong at {where} and its input is right: its norm, its weights or its activation",
        )
    if part != "attention":
        return Explanation(
            "residual", f"attention and MLP of {tap} are right and their sum is wrong at {where}: the residual addition"
        )
    return _explain_attention(wrong, positions, spans, where)


def _leads_to(before: str | None, tap: str) -> bool:
    """Whether `before` is the tap directly before `tap`, so that a fault between them is in one part of the model."""
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
    if 0 in bad:  # token 0 attends only to itself: rotary angles do not affect it
        return Explanation(
            "weights",
            f"attention is wrong at {where}, including the first token, which should see only itself: values, output projection, norm or their weights, or a mask that lets it see more",
        )
    inside = spans >= 0
    if inside.any() and not (wrong & ~inside & (positions < positions[inside].min())).any():
        only = (wrong & inside).any() and not (wrong & ~inside).any()
        if only:
            return Explanation(
                "mask",
                f"attention is wrong at {where} and nowhere else: tokens of a span see the wrong keys (causal instead of bidirectional, or a key_stop that is too small)",
            )
    first = min(bad)
    if len(bad) >= _MIN_SHARE * int((positions >= first).sum()) and first <= 2:
        return Explanation(
            "positions",
            f"attention is wrong at {where}, all but the first token: rotary angles, query or key weights, the scale of the scores, or the map from query to key heads",
        )
    return Explanation(
        "mask",
        f"attention is wrong at {where} and right at earlier tokens: positions from there on, the mask, a window, or a page of the KV cache",
    )


def _explain_head(reference: torch.Tensor, state: torch.Tensor, where: str) -> Explanation:
    ranks = [logits.argsort(dim=-1).argsort(dim=-1) for logits in (reference, state)]
    same_order = int((ranks[0] - ranks[1]).abs().max()) <= max(
        2, reference.shape[-1] // 500
    )  # rounding exchanges neighbouring ranks
    ratio = float(state.double().abs().amax() / reference.double().abs().amax())
    if same_order and ratio > 1.02:
        return Explanation(
            "head",
            f"logits keep their order and are up to {ratio:.3g} times as large at {where}: a softcap was dropped",
        )
    if same_order and ratio < 0.98:
        return Explanation(
            "head",
            f"logits keep their order and shrink to {ratio:.3g} of their size at {where}: an unwanted softcap was applied",
        )
    return Explanation(
        "head", f"the last hidden state is right and the logits are wrong at {where}: the head's weights"
    )


def _where(wrong: torch.Tensor, positions: torch.Tensor, spans: torch.Tensor) -> str:
    count, total = int(wrong.sum()), len(positions)
    first = int(positions[wrong][0])
    if count == total:
        return f"all {total} tokens"
    wrong_spans = sorted({int(span) for span in spans[wrong].tolist() if span >= 0})
    inside = (
        f", all in span{'s' * (len(wrong_spans) > 1)} {', '.join(map(str, wrong_spans))}"
        if wrong_spans and (spans[wrong] >= 0).all()
        else ""
    )
    return f"{count} of {total} tokens from {first} on{inside}"


def _placeholders_unknown(prompt: Prompt, model: Model) -> bool:
    """Whether an id is outside the embedding table, as placeholder ids inside ranges may be."""
    size = len(model.embedding_table)
    return any(not 0 <= token < size for token in prompt.input_ids)
