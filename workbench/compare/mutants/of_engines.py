"""Faults of what the engine computes: masks, angles, norms, weights, pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ...engines.api import Engine
from ...engines.numba_engine.batch import Batch
from ...engines.numba_engine.engine import NumbaEngine
from ...engines.numba_engine.operations import Linear
from .mutant import mutant
from .plant import change_batch, in_two_chunks


def _backbone(engine: NumbaEngine, **changes: Any) -> Engine:
    engine.decoder.backbone = dataclasses.replace(engine.decoder.backbone, **changes)
    return engine


@contextmanager
def _weight_of(linear: Linear) -> Iterator[torch.Tensor]:
    """A copy of a map's weight to change, which is then its weight."""
    weight = linear.weight.clone()
    yield weight
    linear.weight = weight


def _read_pages(batch: Batch, instead: Mapping[int, int]) -> None:
    """Let places of the block table name the page of another place."""
    table = batch.block_table.copy()
    for place, other in instead.items():
        table[:, place] = batch.block_table[:, other]
    batch.block_table = table


def _heads(engine: NumbaEngine) -> tuple[int, int, int]:
    backbone = engine.decoder.backbone
    return backbone.heads, backbone.kv_heads, backbone.head_dim


@mutant(
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

    return change_batch(engine, change)


@mutant("sees the next token", "the causal mask is one key too wide", "layers.0.attention", kind="weights")
def _reach_long(engine: NumbaEngine) -> Engine:
    def change(batch: Batch) -> None:
        batch.reach = (batch.reach + 1).clamp(max=int(batch.lengths[0]) - 1)

    return change_batch(engine, change)


@mutant("rotary base", "rope_theta ten times as large", "layers.0.attention", kind="positions")
def _rope_base(engine: NumbaEngine) -> Engine:
    ropes = {
        rope: dataclasses.replace(
            rope, frequencies=rope.frequencies * 10.0 ** -torch.linspace(0, 1, len(rope.frequencies)).double()
        )
        for rope in engine.decoder.backbone.ropes
        if rope is not None
    }
    return _backbone(engine, ropes=tuple(ropes[rope] if rope else None for rope in engine.decoder.backbone.ropes))


@mutant("rotary pairs", "neighbouring channels turned instead of halves", "layers.0.attention", kind="positions")
def _rope_pairs(engine: NumbaEngine) -> Engine:
    turned = {
        rope: dataclasses.replace(rope, interleaved=not rope.interleaved)
        for rope in engine.decoder.backbone.ropes
        if rope
    }
    return _backbone(engine, ropes=tuple(turned[rope] if rope else None for rope in engine.decoder.backbone.ropes))


@mutant(
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

    return change_batch(engine, change)


@mutant("score scale", "scores divided by head_dim instead of its root", "layers.0.attention", kind="positions")
def _score_scale(engine: NumbaEngine) -> Engine:
    head_dim = engine.decoder.backbone.head_dim
    return _backbone(engine, scale=1.0 / head_dim)


@mutant("norm epsilon", "epsilon of all norms 1e-6 instead of 1e-5", "layers.0.attention", kind="weights")
def _epsilon(engine: NumbaEngine) -> Engine:
    return _backbone(engine, epsilon=engine.decoder.backbone.epsilon / 10)


@mutant(
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


@mutant("two layers exchanged", "layers 3 and 4 in each other's place", "layers.3.attention", kind="weights")
def _layers_exchanged(engine: NumbaEngine) -> Engine:
    layers = engine.decoder.layers
    layers[3], layers[4] = layers[4], layers[3]
    return engine


@mutant("gate and up exchanged", "the MLP gates by the wrong half", "layers.2.mlp", kind="weights")
def _gate_up(engine: NumbaEngine) -> Engine:
    linear = engine.decoder.layers[2].gate_up
    linear.weight = torch.cat(linear.weight.chunk(2)[::-1]).contiguous()
    return engine


@mutant("activation", "GELU instead of SiLU, or the other way round", "layers.0.mlp", kind="weights")
def _activation(engine: NumbaEngine) -> Engine:
    return _backbone(engine, gelu=not engine.decoder.backbone.gelu)


@mutant("a dead row", "one row of an output projection is zero", "layers.2.attention", kind="weights")
def _dead_row(engine: NumbaEngine) -> Engine:
    with _weight_of(engine.decoder.layers[2].output) as weight:
        weight[7] = 0.0
    return engine


@mutant(
    "weights half a percent off",
    "40 rows of one MLP matrix, as after a careless conversion",
    "layers.2.mlp",
    kind="weights",
)
def _half_percent(engine: NumbaEngine) -> Engine:
    with _weight_of(engine.decoder.layers[2].down) as weight:
        weight[:40] *= 1.005
    return engine


@mutant("weights in 8 bits", "one matrix rounded to 8 bits a row", "layers.1.attention", kind="weights")
def _eight_bits(engine: NumbaEngine) -> Engine:
    linear = engine.decoder.layers[1].output
    step = linear.weight.abs().amax(dim=1, keepdim=True) / 127
    linear.weight = (linear.weight / step).round() * step
    return engine


@mutant("a layer skipped", "the last MLP adds nothing", "layers.{last}.mlp", kind="")
def _skipped(engine: NumbaEngine) -> Engine:
    linear = engine.decoder.layers[-1].down
    linear.weight = torch.zeros_like(linear.weight)
    return engine


@mutant("final norm", "the final norm's weight is one", "norm", kind="weights")
def _final_norm(engine: NumbaEngine) -> Engine:
    engine.decoder.norm = torch.ones_like(engine.decoder.norm)
    return engine


@mutant("head", "two rows of the head exchanged", "logits", kind="head")
def _head(engine: NumbaEngine) -> Engine:
    with _weight_of(engine.decoder.head) as weight:
        weight[[10, 11]] = weight[[11, 10]]
    return engine


@mutant(
    "KV pages mixed up",
    "the second chunk of a prefill writes into a page of the first",
    "layers.0.attention",
    kind="mask",
)
def _pages_mixed(engine: NumbaEngine) -> Engine:
    return in_two_chunks(engine, lambda second: _read_pages(second, {1: 2, 2: 1}))


@mutant("stale page", "the second chunk reads a page that was not filled again", "layers.0.attention", kind="mask")
def _page_stale(engine: NumbaEngine) -> Engine:
    return in_two_chunks(engine, lambda second: _read_pages(second, {0: 1}))


@mutant("softcap dropped", "scores are not capped", "layers.0.attention", needs="softcap", kind="positions")
def _softcap(engine: NumbaEngine) -> Engine:
    return _backbone(engine, softcap=0.0)


@mutant("final softcap dropped", "logits are not capped", "logits", needs="softcap", kind="head")
def _final_softcap(engine: NumbaEngine) -> Engine:
    return _backbone(engine, final_softcap=0.0)


@mutant("window one short", "local layers see one key less", "layers.0.attention", needs="window", kind="mask")
def _window(engine: NumbaEngine) -> Engine:
    windows = engine.decoder.backbone.windows
    return _backbone(engine, windows=tuple(window and window - 1 for window in windows))


@mutant("window ignored", "local layers see everything", "layers.0.attention", needs="window", kind="mask")
def _no_window(engine: NumbaEngine) -> Engine:
    return _backbone(engine, windows=tuple(None for _ in engine.decoder.backbone.windows))


@mutant(
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


@mutant(
    "biases dropped", "query, key and value biases are left out", "layers.0.attention", needs="bias", kind="weights"
)
def _biases(engine: NumbaEngine) -> Engine:
    for layer in engine.decoder.layers:
        layer.qkv.bias = None
    return engine


@mutant(
    "embedding scale",
    "looked-up rows are not multiplied by sqrt(hidden)",
    "embed",
    needs="embedding scale",
    kind="scale",
)
def _embedding_scale(engine: NumbaEngine) -> Engine:
    engine.decoder.table = engine.decoder.table / engine.decoder.backbone.embedding_scale
    return engine
