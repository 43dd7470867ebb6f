"""Faults in what the engine computes: masks, rotary angles, norms, weights, KV pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..engines.base import Engine
from ..engines.numba_engine.batch import Batch
from ..engines.numba_engine.engine import NumbaEngine
from ..engines.numba_engine.ops import Linear
from ..errors import ModelError
from .inject import change_batch, prefill_in_two_chunks
from .registry import engine_fault


def _reconfigured(engine: NumbaEngine, **changes: Any) -> Engine:
    engine.decoder.config = dataclasses.replace(engine.decoder.config, **changes)
    return engine


@contextmanager
def _weight_of(linear: Linear) -> Iterator[torch.Tensor]:
    """Yield a copy of a linear layer's weight, to be changed in place; on exit it becomes the layer's weight."""
    weight = linear.weight.clone()
    yield weight
    linear.weight = weight


def _replace_pages(batch: Batch, sources: Mapping[int, int]) -> None:
    """Replace columns of the block table: `sources` maps a column to the column whose page numbers it gets."""
    table = batch.block_table.copy()
    for column, source in sources.items():
        table[:, column] = batch.block_table[:, source]
    batch.block_table = table


def _heads(engine: NumbaEngine) -> tuple[int, int, int]:
    config = engine.decoder.config
    return config.heads, config.kv_heads, config.head_dim


def _dense(engine: NumbaEngine, number: int) -> tuple[Linear, Linear]:
    """The two products of a layer's MLP."""
    layer = engine.decoder.layers[number]
    if layer.gate_up is None or layer.down is None:
        raise ModelError(
            f"this fault needs an MLP in layer {number if number >= 0 else len(engine.decoder.layers) + number}, and "
            f"{engine.model.name!r} has a mixture of experts there: choose another fault"
        )
    return layer.gate_up, layer.down


@engine_fault(
    "key_stop one short",
    "tokens of a bidirectional span do not see its last token",
    "layers.0.attention",
    bidirectional=True,
    diagnosis="mask",
)
def _key_stop_short(engine: NumbaEngine) -> Engine:
    def change(batch: Batch) -> None:
        own_stop = batch.query_positions.to(batch.key_stop) + 1
        batch.key_stop = torch.where(batch.key_stop > own_stop, batch.key_stop - 1, batch.key_stop)

    return change_batch(engine, change)


@engine_fault("sees the next token", "the causal mask is one key too wide", "layers.0.attention", diagnosis="weights")
def _key_stop_long(engine: NumbaEngine) -> Engine:
    def change(batch: Batch) -> None:
        batch.key_stop = (batch.key_stop + 1).clamp(max=int(batch.seq_lens[0]))

    return change_batch(engine, change)


@engine_fault("rotary base", "rope_theta ten times as large", "layers.0.attention", diagnosis="positions")
def _rope_base(engine: NumbaEngine) -> Engine:
    ropes = {
        rope: dataclasses.replace(
            rope, frequencies=rope.frequencies * 10.0 ** -torch.linspace(0, 1, len(rope.frequencies)).double()
        )
        for rope in engine.decoder.config.ropes
        if rope is not None
    }
    return _reconfigured(engine, ropes=tuple(ropes[rope] if rope else None for rope in engine.decoder.config.ropes))


@engine_fault(
    "rotary pairs", "neighbouring channels paired instead of halves", "layers.0.attention", diagnosis="positions"
)
def _rope_pairs(engine: NumbaEngine) -> Engine:
    turned = {
        rope: dataclasses.replace(rope, interleaved=not rope.interleaved)
        for rope in engine.decoder.config.ropes
        if rope
    }
    return _reconfigured(engine, ropes=tuple(turned[rope] if rope else None for rope in engine.decoder.config.ropes))


@engine_fault(
    "positions from one",
    "positions count from 1 in queries and keys of the second half",
    "layers.0.attention",
    diagnosis="mask",
)
def _positions_late(engine: NumbaEngine) -> Engine:
    def change(batch: Batch) -> None:
        batch.positions = (
            batch.positions + (torch.arange(batch.positions.shape[-1]) >= batch.positions.shape[-1] // 2).long()
        )

    return change_batch(engine, change)


@engine_fault(
    "score scale", "scores divided by head_dim instead of its square root", "layers.0.attention", diagnosis="positions"
)
def _score_scale(engine: NumbaEngine) -> Engine:
    head_dim = engine.decoder.config.head_dim
    return _reconfigured(engine, scale=1.0 / head_dim)


@engine_fault("norm epsilon", "epsilon of all norms 1e-6 instead of 1e-5", "layers.0.attention", diagnosis="weights")
def _epsilon(engine: NumbaEngine) -> Engine:
    return _reconfigured(engine, epsilon=engine.decoder.config.epsilon / 10)


@engine_fault(
    "KV heads exchanged",
    "the map from query heads to key heads is off by one",
    "layers.5.attention",
    diagnosis="weights",
    min_layers=6,
)
def _kv_heads(engine: NumbaEngine) -> Engine:
    heads, kv_heads, head_dim = _heads(engine)
    config, linear = engine.decoder.config, engine.decoder.layers[5].qkv
    if config.latent or config.is_linear(5):
        raise ModelError(
            f"this fault needs a projection to key heads in layer 5, which {engine.model.name!r} does not have (latent or linear attention): "
            "choose another fault"
        )
    weight = linear.weight.clone().view(-1, head_dim, linear.weight.shape[1])
    for first in (heads, heads + kv_heads):
        weight[first : first + kv_heads] = weight[first : first + kv_heads].roll(1, 0)
    linear.weight = weight.view(linear.weight.shape)
    return engine


@engine_fault(
    "two layers exchanged",
    "layers 3 and 4 exchanged",
    "layers.3.attention",
    diagnosis="weights",
    min_layers=5,
)
def _layers_exchanged(engine: NumbaEngine) -> Engine:
    layers = engine.decoder.layers
    layers[3], layers[4] = layers[4], layers[3]
    return engine


@engine_fault("gate and up exchanged", "the MLP uses the wrong half as its gate", "layers.2.mlp", diagnosis="weights")
def _gate_up(engine: NumbaEngine) -> Engine:
    linear = _dense(engine, 2)[0]
    linear.weight = torch.cat(linear.weight.chunk(2)[::-1]).contiguous()
    return engine


@engine_fault("activation", "GELU instead of SiLU, or the other way round", "layers.0.mlp", diagnosis="weights")
def _activation(engine: NumbaEngine) -> Engine:
    _dense(engine, 0)  # experts have their own
    return _reconfigured(engine, gelu=not engine.decoder.config.gelu)


@engine_fault("a dead row", "one row of an output projection is zero", "layers.2.attention", diagnosis="weights")
def _dead_row(engine: NumbaEngine) -> Engine:
    with _weight_of(engine.decoder.layers[2].output) as weight:
        weight[7] = 0.0
    return engine


@engine_fault(
    "weights half a percent off",
    "40 rows of one MLP matrix, as after a careless conversion",
    "layers.2.mlp",
    diagnosis="weights",
)
def _half_percent(engine: NumbaEngine) -> Engine:
    with _weight_of(_dense(engine, 2)[1]) as weight:
        weight[:40] *= 1.005
    return engine


@engine_fault("weights in 8 bits", "one matrix rounded to 8 bits row by row", "layers.1.attention", diagnosis="weights")
def _eight_bits(engine: NumbaEngine) -> Engine:
    linear = engine.decoder.layers[1].output
    step = linear.weight.abs().amax(dim=1, keepdim=True) / 127
    linear.weight = (linear.weight / step).round() * step
    return engine


@engine_fault("a layer skipped", "the last MLP adds nothing", "layers.{last}.mlp", diagnosis="")
def _skipped(engine: NumbaEngine) -> Engine:
    linear = _dense(engine, -1)[1]
    linear.weight = torch.zeros_like(linear.weight)
    return engine


@engine_fault("final norm", "the final norm's weight is all ones", "norm", diagnosis="weights")
def _final_norm(engine: NumbaEngine) -> Engine:
    engine.decoder.norm = torch.ones_like(engine.decoder.norm)
    return engine


@engine_fault("head", "two rows of the head exchanged", "logits", diagnosis="head")
def _head(engine: NumbaEngine) -> Engine:
    with _weight_of(engine.decoder.head) as weight:
        weight[[10, 11]] = weight[[11, 10]]
    return engine


@engine_fault(
    "KV pages mixed up",
    "the second chunk of a prefill writes into a page of the first",
    "layers.0.attention",
    diagnosis="mask",
)
def _pages_mixed(engine: NumbaEngine) -> Engine:
    return prefill_in_two_chunks(engine, lambda second: _replace_pages(second, {1: 2, 2: 1}))


@engine_fault("stale page", "the second chunk reads page 1 in place of page 0", "layers.0.attention", diagnosis="mask")
def _page_stale(engine: NumbaEngine) -> Engine:
    return prefill_in_two_chunks(engine, lambda second: _replace_pages(second, {0: 1}))


@engine_fault("softcap dropped", "scores are not capped", "layers.0.attention", needs="softcap", diagnosis="positions")
def _softcap(engine: NumbaEngine) -> Engine:
    return _reconfigured(engine, softcap=0.0)


@engine_fault("final softcap dropped", "logits are not capped", "logits", needs="softcap", diagnosis="head")
def _final_softcap(engine: NumbaEngine) -> Engine:
    return _reconfigured(engine, final_softcap=0.0)


@engine_fault(
    "window one short", "local layers see one key too few", "layers.0.attention", needs="window", diagnosis="mask"
)
def _window(engine: NumbaEngine) -> Engine:
    windows = engine.decoder.config.windows
    if not any(isinstance(window, int) for window in windows):
        raise ModelError(
            f"this fault needs sliding windows, which {engine.model.name!r} does not have: choose another fault"
        )
    return _reconfigured(engine, windows=tuple(window - 1 if isinstance(window, int) else window for window in windows))


@engine_fault("window ignored", "local layers see all keys", "layers.0.attention", needs="window", diagnosis="mask")
def _no_window(engine: NumbaEngine) -> Engine:
    return _reconfigured(engine, windows=tuple(None for _ in engine.decoder.config.windows))


@engine_fault(
    "head norms dropped",
    "queries and keys are not normalised",
    "layers.0.attention",
    needs="head norms",
    diagnosis="positions",
)
def _head_norms(engine: NumbaEngine) -> Engine:
    for layer in engine.decoder.layers:
        layer.head_norms = None
    return engine


@engine_fault(
    "biases dropped",
    "query, key and value biases are left out",
    "layers.0.attention",
    needs="bias",
    diagnosis="weights",
)
def _biases(engine: NumbaEngine) -> Engine:
    for layer in engine.decoder.layers:
        layer.qkv.bias = None
    return engine


@engine_fault(
    "embedding scale",
    "looked-up rows are not multiplied by sqrt(hidden)",
    "embed",
    needs="embedding scale",
    diagnosis="scale",
)
def _embedding_scale(engine: NumbaEngine) -> Engine:
    engine.decoder.table = engine.decoder.table / engine.decoder.config.embedding_scale
    return engine
