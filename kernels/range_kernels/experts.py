"""The experts of a mixture of experts (Shazeer et al. 2017, arXiv:1701.06538): for every row a weighted sum of a few of many gated MLPs.

Rows are sorted by expert, so that all experts together are two grouped products with the gate between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .cpu import launch
from .ops import sigmoid


@dataclass(frozen=True)
class ClippedGate:
    """gpt-oss's gate: `min(gate, limit) * sigmoid(alpha * gate) * (clip(up, -limit, limit) + 1)`, gate and up in alternate columns."""

    alpha: float
    limit: float


class Experts:
    """`sum_k weights[i, k] * down[e](activation(gate[e](x[i])) * up[e](x[i]))` with `e = chosen[i, k]`.

    On the CPU in float32 the products are kernels of this package, and the result of a row is bit-identical whatever other rows are in
    the batch. In bfloat16 on a GPU they are torch's grouped product, which needs no count on the host and can be captured in a CUDA
    graph. Otherwise each expert is a product of its own.

    Args:
        gate_up: `[experts, 2 * intermediate, hidden]`, the gate's rows first; with a `ClippedGate` they alternate.
        down: `[experts, hidden, intermediate]`, dtype and device of `gate_up`.
        gate_up_bias, down_bias: `[experts, outputs]`, or None.
        gelu: tanh-approximated GELU instead of SiLU; clipped: gpt-oss's gate instead of both.
        scaled_input: the weight multiplies the expert's input, not its output (Llama 4).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """

    def __init__(
        self,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        *,
        gelu: bool = False,
        clipped: ClippedGate | None = None,
        scaled_input: bool = False,
    ) -> None:
        if gate_up.ndim != 3 or down.ndim != 3 or 0 in gate_up.shape:
            raise ValueError(
                f"gate_up is {tuple(gate_up.shape)}, down {tuple(down.shape)}: expected [experts, outputs, inputs]"
            )
        self.count, width, self.hidden = gate_up.shape
        expected = (self.count, self.hidden, width // 2)
        if width % 2 or down.shape != expected or down.dtype != gate_up.dtype or down.device != gate_up.device:
            raise ValueError(
                f"down is {down.dtype} {tuple(down.shape)} on {down.device}: gate_up {gate_up.dtype} {tuple(gate_up.shape)} on "
                f"{gate_up.device} needs {expected}"
            )
        for name, bias, outputs in (("gate_up_bias", gate_up_bias, width), ("down_bias", down_bias, self.hidden)):
            if bias is not None and bias.shape != (self.count, outputs):
                raise ValueError(f"{name} is {tuple(bias.shape)}: expected {(self.count, outputs)}")
        self.dtype, self.device, self.intermediate = gate_up.dtype, gate_up.device, width // 2
        self.biases = (gate_up_bias, down_bias)
        self.gelu, self.clipped, self.scaled_input = gelu, clipped, scaled_input
        self.native = self.device.type == "cpu" and self.dtype == torch.float32
        # torch's grouped product reads rows in pieces of 16 bytes.
        aligned = not (self.hidden % 8 or self.intermediate % 8)
        self.grouped = self.device.type == "cuda" and self.dtype == torch.bfloat16 and aligned
        self._weights: tuple[torch.Tensor, ...] = (gate_up, down)
        if self.native:
            self._panels = tuple(launch.pack_groups(weight) for weight in self._weights)
            self._weights = ()

    def tensors(self) -> list[torch.Tensor]:
        """Weights and biases, kept as torch tensors."""
        return [*self._weights, *(bias for bias in self.biases if bias is not None)]

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Run `x` `[rows, hidden]` through its experts; returns `[rows, hidden]` in the dtype of `x`.

        Args:
            chosen: int64 `[rows, k]`, different experts in each row, ascending: they are added up in this order. On a GPU their range is
                not checked, which would wait for it.
            weights: float `[rows, k]`.

        Raises:
            ValueError: shapes, dtypes or devices do not fit.
        """
        if x.ndim != 2 or x.shape[1] != self.hidden or x.dtype != self.dtype or x.device.type != self.device.type:
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)} on {x.device}: expected {self.dtype} [rows, {self.hidden}] on {self.device}"
            )
        if chosen.ndim != 2 or len(chosen) != len(x) or weights.shape != chosen.shape or chosen.dtype != torch.int64:
            raise ValueError(
                f"chosen is {chosen.dtype} {tuple(chosen.shape)}, weights {tuple(weights.shape)}: expected int64 and float "
                f"[{len(x)}, k]"
            )
        if not x.numel():
            return torch.empty_like(x)
        flat = chosen.flatten()
        if self.device.type == "cpu" and not bool(((flat >= 0) & (flat < self.count)).all()):
            raise ValueError(
                f"chosen is {int(flat.min())} to {int(flat.max())}: there are {self.count} experts, from 0"
            )
        order = torch.argsort(flat, stable=True)  # the pairs of a row and an expert, by expert
        experts, rows = flat[order], order // chosen.shape[1]
        factors = weights.flatten()[order, None] if self.scaled_input else None
        if self.native:
            return self._sum(self._native(x, experts, rows, order, factors).view(*chosen.shape, -1), weights)
        taken = x[rows]
        out = self._by_torch(taken if factors is None else (taken * factors).to(x.dtype), experts)
        back = torch.empty_like(out)
        back[order] = out
        return self._sum(back.view(*chosen.shape, self.hidden), weights)

    def _sum(self, each: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of what a row's experts return, `[rows, k, hidden]`."""
        if self.native:  # one sum after the other: how torch's `sum` groups the terms may depend on the shape
            total = each[:, 0] if self.scaled_input else each[:, 0] * weights[:, :1]
            for k in range(1, each.shape[1]):
                total = total + (each[:, k] if self.scaled_input else each[:, k] * weights[:, k : k + 1])
            return total
        terms = each.float() if self.scaled_input else each.float() * weights[..., None].float()
        return terms.sum(dim=1).to(each.dtype)

    def _native(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        rows: torch.Tensor,
        order: torch.Tensor,
        factors: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the experts return for each pair, in the order of the pairs; `rows`, `experts` and `factors` are sorted by expert."""
        counts = np.bincount(experts.numpy(), minlength=self.count)
        groups = launch.Groups.of(counts)
        source = torch.zeros(len(groups.of_slot), dtype=torch.int64)  # row 0 where a slot is not used
        source[groups.slots] = rows
        padded = x[source]
        if factors is not None:
            padded[groups.slots] = padded[groups.slots] * factors
        both = self._biased(launch.grouped_linear(padded, groups, self._panels[0], 2 * self.intermediate), 0, groups)
        if self.clipped is None:
            gated = launch.gate(both, self.gelu)
        else:
            gated = _clipped_gate(both, self.clipped)
        out = self._biased(launch.grouped_linear(gated, groups, self._panels[1], self.hidden), 1, groups)
        slot_of_pair = torch.empty_like(order)
        slot_of_pair[order] = groups.slots
        return out[slot_of_pair]

    def _biased(self, out: torch.Tensor, which: int, groups: launch.Groups) -> torch.Tensor:
        bias = self.biases[which]
        return out if bias is None else out + bias[groups.of_slot]

    def _by_torch(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        ends = torch.searchsorted(experts, torch.arange(self.count, device=x.device), right=True, out_int32=True)
        biases = [None if bias is None else bias[experts] for bias in self.biases]

        def product(rows: torch.Tensor, which: int) -> torch.Tensor:
            weight, bias = self._weights[which], biases[which]
            if self.grouped:
                out = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
            else:
                out = rows.new_empty(len(rows), weight.shape[1])
                start = 0
                for expert, stop in enumerate(ends.tolist()):
                    if stop > start:
                        out[start:stop] = F.linear(rows[start:stop], weight[expert])
                    start = stop
            return out if bias is None else out + bias

        both = product(x, 0)
        if self.clipped is not None:
            return product(_clipped_gate(both, self.clipped), 1)
        gate, up = both.chunk(2, dim=-1)
        return product((F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)) * up, 1)


def _clipped_gate(both: torch.Tensor, settings: ClippedGate) -> torch.Tensor:
    gate = both[..., ::2].clamp(max=settings.limit)
    up = both[..., 1::2].clamp(min=-settings.limit, max=settings.limit)
    return gate * sigmoid(gate * settings.alpha) * (up + 1)
