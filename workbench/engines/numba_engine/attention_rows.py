"""Attention weights of chosen queries in one layer, recomputed from the layer's own queries, keys and bounds."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from ...errors import ModelError
from ...prompt import Prompt
from ..attention_weights import AttentionRows, check_attention
from .batch import Batch, DecoderInputs
from .decoder import Decoder
from .engine import NumbaEngine
from .model_runner import Chunk
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
        ModelError: a layer with linear attention.
        TraceError: the weights do not fit into half of the free memory.
        EmbeddingRangeError, PromptError, ModelError: as in `Engine.check`.
    """
    engine.check(prompt)
    decoder, length = engine.decoder, len(prompt)
    config = decoder.config
    linear = [layer for layer in layers if 0 <= layer < config.layers and config.is_linear(layer)]
    if linear:
        raise ModelError(
            f"layer {linear[0]} of {engine.model.name!r} has linear attention, which has no attention weights: ask for layers with attention"
        )
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
    heads = decoder.heads(number, decoder.enter(hidden, None, layer.attention_norm), inputs)
    q = heads.queries[queries].double().cpu()
    k = heads.keys.double().cpu().repeat_interleave(config.heads // config.kv_heads, dim=1)
    key_start, key_stop = (each.cpu()[queries] for each in (inputs.key_starts[config.windows[number]], inputs.key_stop))
    keys = torch.arange(len(k))
    visible = (keys >= key_start[:, None]) & (keys < key_stop[:, None])
    scores = torch.einsum("qhd,khd->qhk", q, k) * config.scale
    if config.softcap:
        scores = torch.tanh(scores / config.softcap) * config.softcap
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    if layer.sinks is not None:  # a sink takes its share and has no value
        sinks = layer.sinks.double().cpu()[None, :, None].expand(len(queries), -1, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1).nan_to_num(nan=0.0)[..., : len(k)]
    return AttentionRows(number, tuple(queries), weights, visible, heads.values[..., : config.value_dim].double().cpu())
