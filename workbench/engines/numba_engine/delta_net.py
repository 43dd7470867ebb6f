"""Linear attention of Qwen3.5 and Qwen3-Next: a gated delta rule after a short convolution (Yang et al. 2024, arXiv:2412.06464)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from range_kernels import ops
from range_kernels.delta_net import Sequences, causal_convolution, gated_delta_rule

from .architectures import DeltaNetConfig
from .model_cache import ModelCache
from .weights import TensorReader


class DeltaNet:
    """One layer's linear attention, between its input and output products.

    Attributes:
        index: the layer's index in `ModelCache.recurrent`.
        convolution: float32 `[K, channels]`.
        decay_factor, decay_bias: float32 `[heads]`: a head's logarithmic decay is `decay_factor * softplus(a + decay_bias)`.
        norm: float32 `[value_dim]`.
    """

    def __init__(self, read: TensorReader, at: str, settings: DeltaNetConfig, index: int, epsilon: float) -> None:
        self.settings, self.index, self.epsilon = settings, index, epsilon
        self.convolution, self.decay_factor, self.decay_bias, self.norm = read.delta_net(at, settings)

    def tensors(self) -> list[torch.Tensor]:
        """All weights."""
        return [self.convolution, self.decay_factor, self.decay_bias, self.norm]

    def __call__(self, projected: torch.Tensor, sequences: Sequences, cache: ModelCache) -> torch.Tensor:
        """The input product's result `[tokens, inputs]` (convolved channels, output gate, beta, a) -> `[tokens, heads * value_dim]`.

        Computed in float32 and rounded once.
        """
        net = self.settings
        inner = net.heads * net.value_dim
        mixed, gate, beta, a = projected.float().split([net.channels, inner, net.heads, net.heads], dim=1)
        mixed = causal_convolution(mixed.contiguous(), self.convolution, sequences, cache.convolution[self.index])
        keys = net.key_heads * net.key_dim
        q, k, v = (
            each.reshape(len(mixed), -1, width).contiguous()
            for each, width in zip(
                mixed.split([keys, keys, inner], dim=1), (net.key_dim, net.key_dim, net.value_dim), strict=True
            )
        )
        decay = self.decay_factor * ops.softplus(a + self.decay_bias)
        seen = gated_delta_rule(q, k, v, decay, ops.sigmoid(beta).contiguous(), sequences, cache.recurrent[self.index])
        # The norm is per head, before the gate.
        if seen.device.type == "cpu":
            normed = ops.rms_norm(seen, self.norm, self.epsilon).flatten(1)
            return ops.gate(torch.cat([gate, normed], dim=1)).to(projected.dtype)
        normed = F.rms_norm(seen, self.norm.shape, self.norm, self.epsilon).flatten(1)
        return (normed * F.silu(gate)).to(projected.dtype)
