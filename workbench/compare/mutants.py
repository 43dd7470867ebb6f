"""Faults planted in the Numba engine or in what it is given: are they caught, and does the first divergence name the place?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..engines.api import Engine
from ..engines.numba_engine.batch import Batch
from ..engines.numba_engine.engine import NumbaEngine
from ..prompt import Prompt, Span
from ..ranges import shift
from . import faults
from .divergence import FirstDivergence, first_divergence
from .faults import FaultyEngine

Plant = Callable[[NumbaEngine], Engine]


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        what: the fault in words.
        tap: where it must show first.
        plant: turns a fresh engine into the faulty one.
        needs: what the model must have: "" (any), "softcap", "window", "head norms", "bias", "embedding scale".
        both_ways: whether the prompt's second item attends both ways.
        kind: what the explanation must be, where it can be told from one state.
    """

    name: str
    what: str
    tap: str
    plant: Plant
    needs: str = ""
    both_ways: bool = False
    kind: str = ""


MUTANTS: dict[str, Mutant] = {}


def _mutant(name: str, what: str, tap: str, **more: Any) -> Callable[[Plant], Plant]:
    def add(plant: Plant) -> Plant:
        MUTANTS[name] = Mutant(name, what, tap, plant, **more)
        return plant

    return add


def _of_prompt(name: str, what: str, fault: Callable[[Prompt], Prompt], tap: str = "embed", **more: Any) -> None:
    MUTANTS[name] = Mutant(name, what, tap, lambda engine: FaultyEngine(engine, fault), **more)


def judge(mutant: Mutant, engine: NumbaEngine, prompt: Prompt) -> FirstDivergence:
    """Plant the fault in an engine, which is spoiled by it, and look for the first divergence."""
    return first_divergence(mutant.plant(engine), prompt)


def mutant_prompt(ids: Sequence[int], rows: torch.Tensor, both_ways: bool = False) -> Prompt:
    """A prompt that shows all faults: two items of six rows `[12, hidden]`, text before, between and after, over three pages long."""
    if len(ids) < 80:
        raise ValueError(f"{len(ids)} token ids: give at least 80, so that pages and windows matter")
    spans = [Span(grid=(2, 3)), Span(grid=(2, 3), attention="bidirectional" if both_ways else "causal")]
    return Prompt(ids, [rows[:6], rows[6:12]], [(20, 26), (50, 56)], spans)


# What the engine is given.

_of_prompt("range +1", "every range one token late", faults.off_by_one, kind="shifted")
_of_prompt(
    "range -1",
    "every range one token early",
    lambda p: p.replace(embedding_ranges=shift(p.embedding_ranges, -1)),
    kind="shifted",
)
_of_prompt(
    "range +7",
    "ranges moved by seven tokens",
    lambda p: p.replace(embedding_ranges=shift(p.embedding_ranges, 7)),
    kind="shifted",
)
_of_prompt(
    "last row lost",
    "each item one row short, its last placeholder used",
    lambda p: p.replace(
        input_embeddings=[item[:-1] for item in p.input_embeddings],
        embedding_ranges=[(start, stop - 1) for start, stop in p.embedding_ranges],
    ),
)
_of_prompt(
    "items swapped",
    "two items in each other's place",
    lambda p: p.replace(input_embeddings=p.input_embeddings[::-1]),
    kind="items",
)
_of_prompt("rows reversed", "the rows of every item in reverse order", faults.rows_reversed, kind="reversed")
_of_prompt(
    "grid transposed",
    "patches in column order",
    lambda p: p.replace(
        input_embeddings=[i.reshape(2, 3, -1).transpose(0, 1).reshape(6, -1) for i in p.input_embeddings]
    ),
    kind="order",
)
_of_prompt(
    "memory transposed",
    "[hidden, rows] read as [rows, hidden]",
    lambda p: p.replace(input_embeddings=[item.t().reshape(item.shape) for item in p.input_embeddings]),
    kind="memory",
)
_of_prompt(
    "placeholders used", "embeddings swallowed, placeholder tokens looked up", faults.placeholders, kind="placeholders"
)
_of_prompt(
    "second item ignored",
    "only the first of two items is spliced",
    lambda p: p.replace(input_embeddings=p.input_embeddings[:1], embedding_ranges=p.embedding_ranges[:1], spans=()),
    kind="placeholders",
)
_of_prompt(
    "row stream shifted",
    "a row too many in the first item shifts the second (TurboMind)",
    lambda p: p.replace(input_embeddings=list(torch.cat(list(p.input_embeddings)).roll(1, 0).split(6))),
    kind="stream",
)
_of_prompt(
    "scale missing",
    "rows divided by sqrt(hidden)",
    lambda p: p.replace(input_embeddings=[item / item.shape[1] ** 0.5 for item in p.input_embeddings]),
    kind="scale",
)
_of_prompt(
    "rows in bfloat16",
    "rows rounded to bfloat16 on their way into a float32 engine",
    lambda p: p.replace(input_embeddings=[item.bfloat16().to(item.dtype) for item in p.input_embeddings]),
)
_of_prompt(
    "float16 overflow",
    "rows went through float16 at a scale where large numbers saturate",
    lambda p: p.replace(
        input_embeddings=[item.clamp(-2 * float(item.std()), 2 * float(item.std())) for item in p.input_embeddings]
    ),
)


def _moved_positions(change: Callable[[torch.Tensor, Prompt], torch.Tensor]) -> Callable[[Prompt], Prompt]:
    return lambda p: p.replace(position_ids=change(torch.arange(len(p)), p))


def _after_image(positions: torch.Tensor, prompt: Prompt) -> torch.Tensor:
    stop = prompt.embedding_ranges[0][1]
    return torch.where(positions >= stop, positions + stop - prompt.embedding_ranges[0][0], positions)


_of_prompt(
    "positions past the image", "positions after an image offset by its length", _moved_positions(_after_image),
    "layers.0.attention", kind="mask",
)  # fmt: skip
_of_prompt(
    "image at one position", "all rows of an image at its first position",
    _moved_positions(lambda x, p: torch.where((x >= 50) & (x < 56), torch.full_like(x, 50), x)), "layers.0.attention", kind="mask",
)  # fmt: skip
_of_prompt(
    "causal where both ways", "a bidirectional span computed causally", lambda p: p.replace(spans=()), "layers.0.attention",
    both_ways=True, kind="mask",
)  # fmt: skip
_of_prompt(
    "both ways where causal", "a causal span whose tokens see each other both ways",
    lambda p: p.replace(spans=[Span(), Span(attention="bidirectional")]), "layers.0.attention", kind="mask",
)  # fmt: skip


# What the engine computes.


def _backbone(engine: NumbaEngine, **changes: Any) -> Engine:
    engine.decoder.backbone = dataclasses.replace(engine.decoder.backbone, **changes)
    return engine


def _change_batch(engine: NumbaEngine, change: Callable[[Batch], None]) -> Engine:
    forward = engine.decoder.forward

    def changed(batch: Batch, pages: Any, tap: Any = None) -> torch.Tensor:
        change(batch)
        return forward(batch, pages, tap)

    engine.decoder.forward = changed  # type: ignore[method-assign]
    return engine


def _heads(engine: NumbaEngine) -> tuple[int, int, int]:
    backbone = engine.decoder.backbone
    return backbone.heads, backbone.kv_heads, backbone.head_dim


@_mutant(
    "reach one short",
    "tokens of a bidirectional span do not see its last one",
    "layers.0.attention",
    both_ways=True,
    kind="mask",
)
def _reach_short(engine: NumbaEngine) -> Engine:
    def change(batch: Batch) -> None:
        places = batch.places.to(batch.reach)
        batch.reach = torch.where(batch.reach > places, batch.reach - 1, batch.reach)

    return _change_batch(engine, change)


@_mutant("sees the next token", "the causal mask is one key too wide", "layers.0.attention", kind="weights")
def _reach_long(engine: NumbaEngine) -> Engine:
    def change(batch: Batch) -> None:
        batch.reach = (batch.reach + 1).clamp(max=int(batch.lengths[0]) - 1)

    return _change_batch(engine, change)


@_mutant("rotary base", "rope_theta ten times as large", "layers.0.attention", kind="positions")
def _rope_base(engine: NumbaEngine) -> Engine:
    ropes = {
        rope: dataclasses.replace(
            rope, frequencies=rope.frequencies * 10.0 ** -torch.linspace(0, 1, len(rope.frequencies)).double()
        )
        for rope in engine.decoder.backbone.ropes
        if rope is not None
    }
    return _backbone(engine, ropes=tuple(ropes[rope] if rope else None for rope in engine.decoder.backbone.ropes))


@_mutant("rotary pairs", "neighbouring channels turned instead of halves", "layers.0.attention", kind="positions")
def _rope_pairs(engine: NumbaEngine) -> Engine:
    turned = {
        rope: dataclasses.replace(rope, interleaved=not rope.interleaved)
        for rope in engine.decoder.backbone.ropes
        if rope
    }
    return _backbone(engine, ropes=tuple(turned[rope] if rope else None for rope in engine.decoder.backbone.ropes))


@_mutant(
    "positions from one",
    "positions count from 1 in queries and keys of the second half",
    "layers.0.attention",
    kind="mask",
)
def _positions_late(engine: NumbaEngine) -> Engine:
    def change(batch: Batch) -> None:
        batch.positions = (
            batch.positions + (torch.arange(batch.positions.shape[-1]) >= batch.positions.shape[-1] // 2).long()
        )

    return _change_batch(engine, change)


@_mutant("score scale", "scores divided by head_dim instead of its root", "layers.0.attention", kind="positions")
def _score_scale(engine: NumbaEngine) -> Engine:
    head_dim = engine.decoder.backbone.head_dim
    return _backbone(engine, scale=1.0 / head_dim)


@_mutant("norm epsilon", "epsilon of all norms 1e-6 instead of 1e-5", "layers.0.attention", kind="weights")
def _epsilon(engine: NumbaEngine) -> Engine:
    return _backbone(engine, epsilon=engine.decoder.backbone.epsilon / 10)


@_mutant(
    "KV heads exchanged", "the map from query heads to key heads is off by one", "layers.5.attention", kind="weights"
)
def _kv_heads(engine: NumbaEngine) -> Engine:
    heads, kv_heads, head_dim = _heads(engine)
    linear = engine.decoder.layers[5].qkv
    weight = linear.weight.clone().view(heads + 2 * kv_heads, head_dim, -1)
    for first in (heads, heads + kv_heads):
        weight[first : first + kv_heads] = weight[first : first + kv_heads].roll(1, 0)
    linear.weight = weight.view(linear.weight.shape)
    return engine


@_mutant("two layers exchanged", "layers 3 and 4 in each other's place", "layers.3.attention", kind="weights")
def _layers_exchanged(engine: NumbaEngine) -> Engine:
    layers = engine.decoder.layers
    layers[3], layers[4] = layers[4], layers[3]
    return engine


@_mutant("gate and up exchanged", "the MLP gates by the wrong half", "layers.2.mlp", kind="weights")
def _gate_up(engine: NumbaEngine) -> Engine:
    linear = engine.decoder.layers[2].gate_up
    linear.weight = torch.cat(linear.weight.chunk(2)[::-1]).contiguous()
    return engine


@_mutant("activation", "GELU instead of SiLU, or the other way round", "layers.0.mlp", kind="weights")
def _activation(engine: NumbaEngine) -> Engine:
    return _backbone(engine, gelu=not engine.decoder.backbone.gelu)


@_mutant("a dead row", "one row of an output projection is zero", "layers.2.attention", kind="weights")
def _dead_row(engine: NumbaEngine) -> Engine:
    linear = engine.decoder.layers[2].output
    weight = linear.weight.clone()
    weight[7] = 0.0
    linear.weight = weight
    return engine


@_mutant(
    "weights half a percent off",
    "40 rows of one MLP matrix, as after a careless conversion",
    "layers.2.mlp",
    kind="weights",
)
def _half_percent(engine: NumbaEngine) -> Engine:
    linear = engine.decoder.layers[2].down
    weight = linear.weight.clone()
    weight[:40] *= 1.005
    linear.weight = weight
    return engine


@_mutant("weights in 8 bits", "one matrix rounded to 8 bits a row", "layers.1.attention", kind="weights")
def _eight_bits(engine: NumbaEngine) -> Engine:
    linear = engine.decoder.layers[1].output
    step = linear.weight.abs().amax(dim=1, keepdim=True) / 127
    linear.weight = (linear.weight / step).round() * step
    return engine


@_mutant("a layer skipped", "the last MLP adds nothing", "layers.{last}.mlp", kind="")
def _skipped(engine: NumbaEngine) -> Engine:
    linear = engine.decoder.layers[-1].down
    linear.weight = torch.zeros_like(linear.weight)
    return engine


@_mutant("final norm", "the final norm's weight is one", "norm", kind="weights")
def _final_norm(engine: NumbaEngine) -> Engine:
    engine.decoder.norm = torch.ones_like(engine.decoder.norm)
    return engine


@_mutant("head", "two rows of the head exchanged", "logits", kind="head")
def _head(engine: NumbaEngine) -> Engine:
    linear = engine.decoder.head
    weight = linear.weight.clone()
    weight[[10, 11]] = weight[[11, 10]]
    linear.weight = weight
    return engine


@_mutant(
    "KV pages mixed up",
    "the second chunk of a prefill writes into a page of the first",
    "layers.0.attention",
    kind="mask",
)
def _pages_mixed(engine: NumbaEngine) -> Engine:
    def spoil(second: Batch) -> None:
        table = second.block_table.copy()
        table[:, [1, 2]] = table[:, [2, 1]]
        second.block_table = table

    return _in_two_chunks(engine, spoil)


@_mutant("stale page", "the second chunk reads a page that was not filled again", "layers.0.attention", kind="mask")
def _page_stale(engine: NumbaEngine) -> Engine:
    def spoil(second: Batch) -> None:
        table = second.block_table.copy()
        table[:, 0] = table[:, 1]
        second.block_table = table

    return _in_two_chunks(engine, spoil)


@_mutant("softcap dropped", "scores are not capped", "layers.0.attention", needs="softcap", kind="positions")
def _softcap(engine: NumbaEngine) -> Engine:
    return _backbone(engine, softcap=0.0)


@_mutant("final softcap dropped", "logits are not capped", "logits", needs="softcap", kind="head")
def _final_softcap(engine: NumbaEngine) -> Engine:
    return _backbone(engine, final_softcap=0.0)


@_mutant("window one short", "local layers see one key less", "layers.0.attention", needs="window", kind="mask")
def _window(engine: NumbaEngine) -> Engine:
    windows = engine.decoder.backbone.windows
    return _backbone(engine, windows=tuple(window and window - 1 for window in windows))


@_mutant("window ignored", "local layers see everything", "layers.0.attention", needs="window", kind="mask")
def _no_window(engine: NumbaEngine) -> Engine:
    return _backbone(engine, windows=tuple(None for _ in engine.decoder.backbone.windows))


@_mutant(
    "head norms dropped",
    "queries and keys are not normalised",
    "layers.0.attention",
    needs="head norms",
    kind="positions",
)
def _head_norms(engine: NumbaEngine) -> Engine:
    for layer in engine.decoder.layers:
        layer.head_norms = None
    return engine


@_mutant(
    "biases dropped", "query, key and value biases are left out", "layers.0.attention", needs="bias", kind="weights"
)
def _biases(engine: NumbaEngine) -> Engine:
    for layer in engine.decoder.layers:
        layer.qkv.bias = None
    return engine


@_mutant(
    "embedding scale",
    "looked-up rows are not multiplied by sqrt(hidden)",
    "embed",
    needs="embedding scale",
    kind="scale",
)
def _embedding_scale(engine: NumbaEngine) -> Engine:
    engine.decoder.table = engine.decoder.table / engine.decoder.backbone.embedding_scale
    return engine


def _in_two_chunks(engine: NumbaEngine, spoil: Callable[[Batch], None]) -> Engine:
    """Run every prefill as two chunks, the second of which is spoilt; taps see both as one."""
    forward = engine.decoder.forward

    def chunked(batch: Batch, pages: Any, tap: Any = None) -> torch.Tensor:
        half = 64  # whole pages
        kept: dict[str, list[torch.Tensor]] = {}
        ends = []
        for part, chunk in enumerate((slice(0, half), slice(half, None))):
            piece = _slice(batch, chunk)
            if part:
                spoil(piece)
            ends.append(forward(piece, pages, lambda name, state: kept.setdefault(name, []).append(state.clone())))
        if tap:
            for name, states in kept.items():
                tap(name, torch.cat(states))
        return torch.cat(ends)

    engine.decoder.forward = chunked  # type: ignore[method-assign]
    return engine


def _slice(batch: Batch, chunk: slice) -> Batch:
    stop = len(batch.hidden) if chunk.stop is None else chunk.stop
    count = stop - chunk.start
    return Batch(
        batch.hidden[chunk],
        batch.positions[..., chunk],
        batch.rope_lengths[chunk],
        batch.places[chunk],
        batch.reach[chunk],
        batch.block_table,
        np.asarray([0, count], np.int32),
        np.asarray([stop], np.int32),
        [],
    )


def outcome(mutant: Mutant, model_name: str, found: FirstDivergence, layers: int) -> dict[str, str]:
    """A row of the table: where it was caught, and whether that is where it was planted."""
    tap = mutant.tap.format(last=layers - 1)
    first = found.divergence
    return {
        "fault": mutant.name,
        "what": mutant.what,
        "model": model_name,
        "caught": "yes" if first is not None else "NO",
        "first divergence": first.tap if first is not None else "",
        "right place": "yes" if first is not None and first.tap == tap else f"NO: {tap}",
        "said to be": found.explanation.kind if found.explanation is not None else "",
    }


def as_markdown(rows: Sequence[dict[str, str]]) -> str:
    """The table."""
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names), *(" | ".join(row.values()) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


# Faults that no single run shows: probes find them.


def stale_prefix_cache(engine: NumbaEngine) -> Engine:
    """The prefix cache looks at token ids only, so that the same ids with other rows are answered from the first ones' states."""
    request = engine._request

    def keyed_by_ids(*arguments: Any) -> Any:
        made = request(*arguments)
        ids = made.prompt.input_ids
        made._digest = lambda sha, start, stop: sha.update(repr(ids[start:stop]).encode())  # type: ignore[method-assign]
        return made

    engine._request = keyed_by_ids  # type: ignore[method-assign, assignment]
    return engine


def placeholders_leak(engine: NumbaEngine) -> Engine:
    """A tenth of what stands under a range is added to its rows."""

    def fault(prompt: Prompt) -> Prompt:
        rows = engine.model.token_rows([token % len(engine.model.embedding_table) for token in prompt.input_ids])
        items = [
            item + 0.1 * rows[start:stop].to(item)
            for item, (start, stop) in zip(prompt.input_embeddings, prompt.embedding_ranges, strict=True)
        ]
        return prompt.replace(input_embeddings=items)

    return FaultyEngine(engine, fault)


def crowded_batch(engine: NumbaEngine) -> Engine:
    """With more than one request in a step the first one's attention reaches a key too few."""

    def change(batch: Batch) -> None:
        if len(batch.lengths) > 1:
            batch.reach = (batch.reach - 1).clamp(min=0)

    return _change_batch(engine, change)


def dice(engine: NumbaEngine, size: float = 1e-3) -> Engine:
    """Hidden state 0 is off by this much of itself, each time another way."""
    generator = torch.Generator().manual_seed(0)

    def change(batch: Batch) -> None:
        noise = torch.randn(batch.hidden.shape, generator=generator)
        batch.hidden = (batch.hidden * (1 + size * noise)).to(batch.hidden.dtype)

    return _change_batch(engine, change)
