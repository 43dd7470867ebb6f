"""Attention weights of chosen queries in one layer, recomputed from the layer's own queries, keys and bounds."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from ...prompt import Prompt
from ..attention_weights import AttentionRows, check_attention
from .batch import Batch, DecoderInputs
from .decoder import Decoder
from .engine import NumbaEngine
from .model_runner import Chunk
from .ops import Rotation
from .request import Request


class _Reached(Exception):
    """The layer's input is there: the rest of the pass is not needed."""


@torch.no_grad()
def attention_rows(
    engine: NumbaEngine, prompt: Prompt, layers: Sequence[int], positions: Sequence[int]
) -> dict[int, AttentionRows]:
    """Run the prompt once and compute the attention of the queries at `positions` in each of `layers`.

    Weights are computed in float64 from the engine's own queries and keys, row by row, so no matrix of all queries is needed.

    Args:
        positions: positions in the prompt; negative ones count from the end.

    Raises:
        ValueError: a layer or position that does not exist.
        TraceError: the weights do not fit into half of the free memory.
        EmbeddingRangeError, PromptError, ModelError: as in `Engine.check`.
    """
    engine.check(prompt)
    decoder, length = engine.decoder, len(prompt)
    config = decoder.config
    needed = 8 * len(layers) * len(positions) * config.heads * length
    queries = check_attention(layers, positions, length, config.layers, needed)
    request = Request(prompt)
    request.pages = list(range(-(-length // engine._page_size)))
    pages = decoder.new_pages(len(request.pages), engine._page_size)
    batch = Batch.of([Chunk(request, 0, length)], decoder.table, engine._page_size, mrope=bool(config.mrope))
    inputs = engine.runner.decoder_inputs(batch, pages)
    entering: dict[int, torch.Tensor] = {}
    wanted = {"embed" if layer == 0 else f"layers.{layer - 1}": layer for layer in layers}

    def tap(name: str, state: torch.Tensor) -> None:
        if name in wanted:
            entering[wanted[name]] = state.clone()
            if len(entering) == len(wanted):
                raise _Reached

    with contextlib.suppress(_Reached):
        decoder.run_layers(inputs, pages, tap)
    return {layer: _attend(decoder, layer, entering[layer], inputs, queries) for layer in layers}


def _attend(
    decoder: Decoder, number: int, hidden: torch.Tensor, inputs: DecoderInputs, queries: list[int]
) -> AttentionRows:
    config, layer = decoder.config, decoder.layers[number]
    for rows, levels in inputs.deepstack:  # added after the tap
        if 0 < number <= len(levels):
            hidden[rows] += levels[number - 1]
    x = decoder.ops.add(hidden, None, layer.attention_norm, config.epsilon).into(layer.qkv)
    x = x.view(len(x), config.heads + 2 * config.kv_heads, config.head_dim)
    rotated = config.heads + config.kv_heads
    rope = config.ropes[number]
    rotation = None if rope is None else Rotation(*inputs.rotations[rope], rope.interleaved)
    heads, _ = decoder.ops.position(x[:, :rotated], layer.head_norms, config.heads, config.epsilon, rotation, None)
    q = heads[queries, : config.heads].double().cpu()
    k = heads[:, config.heads : rotated].double().cpu().repeat_interleave(config.heads // config.kv_heads, dim=1)
    key_start, key_stop = (each.cpu()[queries] for each in (inputs.key_starts[config.windows[number]], inputs.key_stop))
    keys = torch.arange(len(k))
    visible = (keys >= key_start[:, None]) & (keys < key_stop[:, None])
    scores = torch.einsum("qhd,khd->qhk", q, k) * config.scale
    if config.softcap:
        scores = torch.tanh(scores / config.softcap) * config.softcap
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(dim=-1).nan_to_num(nan=0.0)
    return AttentionRows(number, tuple(queries), weights, visible, x[:, rotated:].double().cpu())
