"""Direct logit attribution: what each part of a model, and each embedding range, adds to the difference of two logits.

The last token's residual stream is the sum of the embedding and of what attention and MLP of every layer add. With the scale of the
final norm fixed at its value, the logits are linear in that sum, so the difference of two logits is a sum over the parts (Elhage et al.
2021, "A Mathematical Framework for Transformer Circuits"). An attention part is a sum over its keys, so over ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..engines.base import Engine
from ..engines.numba_engine.attention_rows import attention_rows
from ..engines.numba_engine.decoder import Decoder
from ..engines.numba_engine.engine import NumbaEngine
from ..errors import ModelError
from ..prompt import Prompt
from .attention import key_groups


@dataclass(frozen=True)
class LogitAttribution:
    """The parts of `logit[token] - logit[other]` of a prompt's last token.

    Attributes:
        token, other: ids.
        difference: the difference of the engine's own logits.
        parts: names: "embed", and for each layer "layers.N.attention" and "layers.N.mlp".
        values: float64 `[parts]`; their sum is `difference` up to rounding.
        groups: groups of keys, as in `Attention`, and "bias".
        by_group: float64 `[layers, groups]`: each layer's attention part, by the keys that it comes from; a row sums to the part.
    """

    token: int
    other: int
    difference: float
    parts: tuple[str, ...]
    values: np.ndarray
    groups: tuple[str, ...]
    by_group: np.ndarray

    def __str__(self) -> str:
        order = np.argsort(-np.abs(self.values))[:8]
        lines = [
            f"logit {self.token} - logit {self.other} = {self.difference:+.3f}; sum of the parts {self.values.sum():+.3f}"
        ]
        lines += [f"{self.parts[each]:24} {self.values[each]:+9.3f}" for each in order]
        lines += [
            f"attention to {name:11} {value:+9.3f}"
            for name, value in zip(self.groups, self.by_group.sum(axis=0), strict=True)
        ]
        return "\n".join(lines)


@torch.no_grad()
def logit_attribution(engine: Engine, prompt: Prompt, token: int, other: int) -> LogitAttribution:
    """Attribute the difference of two logits of the last token to the parts of the model and to the prompt's ranges.

    Raises:
        ModelError: an engine that does not expose its weights, a model that caps its logits, or a prompt whose last token gets deepstack features.
        ValueError: token ids outside the vocabulary.
        EmbeddingRangeError, PromptError: as in `Engine.check`.
    """
    if not isinstance(engine, NumbaEngine):
        raise ModelError(f"{engine.capabilities.name} does not expose its weights: open 'numba'")
    decoder = engine.decoder
    config = decoder.config
    if config.final_softcap:
        raise ModelError("this model caps its logits (final_logit_softcapping), so they are not a sum over its parts")
    if config.delta_net is not None:
        raise ModelError(
            "this model has linear attention, whose output is not a sum over the prompt's tokens with weights"
        )
    last = len(prompt) - 1
    if prompt.deepstack and any(start <= last < stop for start, stop in prompt.embedding_ranges):
        raise ModelError(
            "the last token gets deepstack features, which are not one of the parts: put text after the last range"
        )
    if not (0 <= token < config.vocab and 0 <= other < config.vocab):
        raise ValueError(f"tokens {token} and {other}: ids are 0 to {config.vocab - 1}")
    layers = range(config.layers)
    taps = ["embed", *(f"layers.{n}{part}" for n in layers for part in (".attention", ".mlp", "")), "logits"]
    trace = engine.trace(prompt, taps, [len(prompt) - 1])
    states = {tap: trace[tap][0].double() for tap in taps}
    final = states[f"layers.{config.layers - 1}"]
    head = decoder.head.weight
    ids = torch.tensor([token, other], device=head.device)
    rows = head[ids].double().cpu()
    weight = decoder.norm.double().cpu()
    direction = (rows[0] - rows[1]) * weight * config.logit_scale
    if config.layer_norms:  # the norm subtracts the mean, which is the same as a direction without one
        direction, final = direction - direction.mean(), final - final.mean()
    direction = direction / (final.square().mean() + config.epsilon).sqrt()
    parts = {"embed": states["embed"]}
    for number in layers:
        parts[f"layers.{number}.attention"] = states[f"layers.{number}.attention"]
        parts[f"layers.{number}.mlp"] = states[f"layers.{number}.mlp"]
    values = np.array([float(state @ direction) for state in parts.values()])
    groups, by_group = _by_group(engine, prompt, direction, [states[f"layers.{n}.attention"] for n in layers])
    difference = float(states["logits"][token] - states["logits"][other])
    return LogitAttribution(token, other, difference, tuple(parts), values, groups, by_group)


def _by_group(
    engine: NumbaEngine, prompt: Prompt, direction: torch.Tensor, outputs: Sequence[torch.Tensor]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Each layer's attention part along `direction`, by groups of keys; `outputs` are the parts themselves."""
    decoder: Decoder = engine.decoder
    config = decoder.config
    names, members = key_groups(prompt)
    group = config.heads // config.kv_heads
    found = np.zeros((config.layers, len(names) + 1))
    every = attention_rows(engine, prompt, range(config.layers), [-1])
    for number, rows in every.items():
        layer = decoder.layers[number]
        assert rows.values is not None
        along = direction
        weight, bias = layer.output.weight.double().cpu(), layer.output.bias
        if layer.after_attention is not None:  # a norm with its scale fixed, as for the final one
            heads = torch.einsum("hk,khd->hd", rows.weights[0], rows.values.repeat_interleave(group, dim=1)).flatten()
            raw = weight @ heads + (0.0 if bias is None else bias.double().cpu())
            along = direction * layer.after_attention.double().cpu() / (raw.square().mean() + config.epsilon).sqrt()
        per_head = (along @ weight).view(config.heads, config.value_dim)
        values = rows.values.repeat_interleave(group, dim=1)
        per_key = torch.einsum("hk,khd,hd->k", rows.weights[0], values, per_head).numpy()
        found[number, :-1] = members @ per_key * config.residual_scale
        found[number, -1] = 0.0 if bias is None else float(along @ bias.double().cpu()) * config.residual_scale
    return (*names, "bias"), found
