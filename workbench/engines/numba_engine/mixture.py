"""A mixture of experts in place of a layer's MLP: the router, the experts it chooses, and the expert that all tokens use."""

from __future__ import annotations

from typing import Any

import torch
from range_kernels.experts import Experts
from range_kernels.ops import sigmoid

from .architectures import DecoderConfig, MixtureConfig
from .ops import Linear
from .weights import TensorReader


class Mixture:
    """One layer's mixture of experts.

    Attributes:
        router: hidden -> experts, in float32 if `MixtureConfig.wide_router`.
        choice_bias: added to scores for choosing experts, float32 `[experts]`, or None.
        experts: the experts that the router chooses from.
        shared_gate_up, shared_down: the expert that all tokens use, or None; shared_gate: hidden -> 1, its sigmoid is a factor on it.
    """

    def __init__(self, read: TensorReader, at: str, config: DecoderConfig, settings: MixtureConfig, ops: Any) -> None:
        self.settings, self.gelu, self._ops = settings, config.gelu, ops
        self.router: Linear = ops.linear(*read.router(at, settings))
        self.choice_bias = read.choice_bias(at, settings)
        (gate_up, gate_up_bias), (down, down_bias) = read.experts(at, settings)
        self.experts = Experts(
            gate_up, down, gate_up_bias, down_bias, gelu=config.gelu, clipped=settings.clipped, scaled_input=settings.scaled_input
        )  # fmt: skip
        self.shared_gate_up: Linear | None = None
        self.shared_down: Linear | None = None
        self.shared_gate: Linear | None = None
        if settings.shared_intermediate:
            both, last = read.shared_expert(at, settings)
            self.shared_gate_up, self.shared_down = ops.linear(*both), ops.linear(*last)
            gate = read.shared_gate(at, settings)
            self.shared_gate = None if gate is None else ops.linear(gate)

    def tensors(self) -> list[torch.Tensor]:
        """All weights and biases, kept as torch tensors."""
        linears = [each for each in (self.router, self.shared_gate_up, self.shared_down, self.shared_gate) if each]
        every = [self.choice_bias, *self.experts.tensors(), *(x for each in linears for x in (each.weight, each.bias))]
        return [each for each in every if each is not None]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[tokens, hidden]` after the norm -> what the mixture adds to the residual stream."""
        chosen, weights = self.route(x)
        out = self.experts(x, chosen, weights)
        if self.shared_gate_up is None or self.shared_down is None:
            return out
        shared = self.shared_down.of_gate(self.shared_gate_up(x), self.gelu)
        if self.shared_gate is not None:
            shared = sigmoid(self.shared_gate(x)) * shared
        return out + shared

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen experts of `x` `[tokens, hidden]`, int64 `[tokens, k]`, ascending, and their weights, float32 `[tokens, k]`.

        Formulas: the routers of Transformers' classes; groups and the bias for choosing are DeepSeek-V3's (arXiv:2412.19437).
        """
        settings = self.settings
        logits = self.router(x.float() if settings.wide_router else x).float()
        if settings.scores == "softmax of chosen":
            chosen = logits.topk(settings.chosen, dim=-1).indices.sort(dim=-1).values
            return chosen, logits.gather(1, chosen).softmax(dim=-1)
        scores = logits.softmax(dim=-1) if settings.scores == "softmax" else sigmoid(logits)
        # Without a bias the order is that of the logits, of which rounding makes fewer equal.
        preferred = logits if self.choice_bias is None else scores + self.choice_bias
        if settings.groups > 1:  # such families have a bias
            preferred = self._in_best_groups(preferred)
        chosen = preferred.topk(settings.chosen, dim=-1).indices.sort(dim=-1).values
        weights = scores.gather(1, chosen)
        if settings.normalised:
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / (total + settings.floor if settings.floor_added else total.clamp(min=settings.floor))
        return chosen, weights * settings.scale

    def _in_best_groups(self, preferred: torch.Tensor) -> torch.Tensor:
        settings = self.settings
        grouped = preferred.view(len(preferred), settings.groups, -1)
        best = grouped.topk(settings.group_best, dim=-1).values.sum(dim=-1).topk(settings.chosen_groups, dim=-1).indices
        allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=preferred.device).scatter_(1, best, True)
        return grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
