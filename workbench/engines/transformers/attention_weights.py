"""Attention weights of the reference, as the class's own eager attention returns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...errors import ModelError
from ...prompt import Prompt
from ..attention_weights import AttentionRows, check_attention
from .reference import TransformersReference


@torch.no_grad()
def reference_attention(
    engine: TransformersReference, prompt: Prompt, layers: Sequence[int], positions: Sequence[int]
) -> dict[int, AttentionRows]:
    """Run the prompt once with eager attention, which computes dense matrices, and keep the rows of the queries at `positions`.

    Raises:
        ModelError: the weights are streamed, or the class does not return its attention weights, such as linear attention.
        ValueError: a layer or position that does not exist.
        TraceError: one layer's matrix, or the rows, do not fit into half of the free memory.
        EmbeddingRangeError, PromptError: as in `Engine.check`.
    """
    engine.check(prompt)
    if engine.streamed is not None:
        raise ModelError(
            "attention weights are not read from a streamed reference: open it with streamed=False, or open 'numba'"
        )
    length, config = len(prompt), engine.model.text_config
    every = list(engine.decoder_layers)
    nbytes = (
        config.num_attention_heads * length * (8 * len(layers) * len(positions) + 2 * engine.dtype.itemsize * length)
    )
    queries = check_attention(layers, positions, length, len(every), nbytes)
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def look(module: Any, args: tuple, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, torch.Tensor) and weights.ndim == 4 and weights.shape[-2:] == (length, length):
                found.setdefault(layer, weights[0, :, queries].transpose(0, 1).double().cpu())

        return look

    with engine.exclusive():
        before = engine.network.config._attn_implementation
        hooks = [
            module.register_forward_hook(keep(layer))
            for layer in layers
            for module in every[layer].modules()
            if "attention" in type(module).__name__.lower()
        ]
        try:
            engine.network.set_attn_implementation("eager")
            engine.forward(prompt, keep=None)
        finally:
            engine.network.set_attn_implementation(before)
            for hook in hooks:
                hook.remove()
    lacking = [layer for layer in layers if layer not in found]
    if lacking:
        raise ModelError(
            f"layers {lacking} of {type(engine.network).__name__} do not return attention weights (linear attention has none): choose other layers, or open 'numba'"
        )
    return {
        layer: AttentionRows(layer, tuple(queries), found[layer], found[layer].any(dim=1), None) for layer in layers
    }
