"""A decoder's operations other than splice and attention (linear layers, norms, rotation), by device and dtype.

In float32 on the CPU they are kernels of `range_kernels`, in which no bit of a row depends on the other rows. Otherwise they are
torch's, whose rounding may depend on how many rows run together.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from range_kernels import ops as layers


class Linear(Protocol):
    """A linear layer, `[rows, inputs] -> [rows, outputs]`; `weight` `[outputs, inputs]` and `bias` `[outputs]` can be read and set."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...
    def of_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """`self(norm(x, weight, epsilon))`: the RMSNorm and the linear layer after it, which may be one kernel."""

    def of_gate(self, both: torch.Tensor, gelu: bool) -> torch.Tensor:
        """`self(activation(gate) * up)`, with gate and up side by side in `both` `[rows, 2 * inputs]`.

        The activation is tanh-approximated GELU if `gelu`, else SiLU.
        """


class Operations(Protocol):
    """The operations for one device and dtype."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear: ...

    def norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) over the last dimension."""

    def rotate(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleaved: bool) -> torch.Tensor:
        """Rotate pairs of channels of `x` `[tokens, heads, head_dim]`; `cosine`, `sine` `[tokens, pairs]`, float32."""


class CpuOperations:
    """Kernels of `range_kernels`, for float32 on the CPU."""

    linear = staticmethod(layers.Linear)
    norm = staticmethod(layers.rms_norm)
    rotate = staticmethod(layers.rotate)


class TorchLinear:
    """A linear layer by torch's matrix product."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def of_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        return self(TorchOperations.norm(x, weight, epsilon))

    def of_gate(self, both: torch.Tensor, gelu: bool) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return self((F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up)


class TorchOperations:
    """torch's operations, for any dtype and device; norms and rotations are computed in float32 and rounded to the dtype."""

    linear = staticmethod(TorchLinear)

    @staticmethod
    def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        if weight.dtype is not x.dtype:  # norm weights with an offset (Gemma) are kept in float32
            return F.rms_norm(x.float(), weight.shape, weight, epsilon).to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, epsilon)

    @staticmethod
    def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleaved: bool) -> torch.Tensor:
        rotated = 2 * cosine.shape[-1]
        pairs, rest = x[..., :rotated].float(), x[..., rotated:]
        first, second = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, dim=-1)
        cosine, sine = cosine[:, None], sine[:, None]
        new = (first * cosine - second * sine, second * cosine + first * sine)
        joined = torch.stack(new, dim=-1).flatten(-2) if interleaved else torch.cat(new, dim=-1)
        return torch.cat((joined.to(x.dtype), rest), dim=-1)


def operations(dtype: torch.dtype, device: torch.device) -> Operations:
    """Return the operations for this dtype on this device."""
    return CpuOperations() if dtype is torch.float32 and device.type == "cpu" else TorchOperations()
