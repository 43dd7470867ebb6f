"""A decoder's operations other than splice and attention (linear layers, norms, rotation), by device and dtype.

In float32 on the CPU they are kernels of `range_kernels`, in which no bit of a row depends on the other rows. On a GPU matrix products
are torch's, whose rounding may depend on how many rows run together, and the rest are kernels of `range_kernels`. Otherwise all are torch's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from range_kernels import ops as kernels

from ...errors import ModelError

if TYPE_CHECKING:
    from .delta_net import DeltaNet
    from .latent_attention import LatentAttention
    from .mixture import Mixture

FEW_ROWS = 64
"""Up to this many rows a step in bfloat16 on the CPU is a native call, with `packed_decode`."""


@dataclass
class Layer:
    """Weights of one layer; query, key and value projections are stacked, and so are gate and up. A norm that the family lacks is None.

    Attributes:
        mixture: a mixture of experts in place of the MLP; a layer has either it or `gate_up` and `down`.
        latent: latent attention; `qkv` is its first product then.
        delta_net: linear attention in place of attention; `qkv` is its input product then, and `output` its output product.
    """

    attention_norm: torch.Tensor | None  # [hidden]
    qkv: Linear  # hidden -> (q_heads + 2 kv_heads) * head_dim
    head_norms: torch.Tensor | None  # [2, head_dim], of queries and keys
    output: Linear  # q_heads * head_dim -> hidden
    after_attention: torch.Tensor | None  # [hidden]
    mlp_norm: torch.Tensor | None
    gate_up: Linear | None  # hidden -> 2 * intermediate
    down: Linear | None  # intermediate -> hidden
    after_mlp: torch.Tensor | None
    mixture: Mixture | None = None
    delta_net: DeltaNet | None = None
    latent: LatentAttention | None = None
    sinks: torch.Tensor | None = None  # float32 [q_heads]

    @property
    def linears(self) -> list[Linear]:
        """The linear layers outside a mixture."""
        return [each for each in (self.qkv, self.output, self.gate_up, self.down) if each is not None]

    def mlp(self, entered: Sum, gelu: bool) -> torch.Tensor:
        """What the MLP or mixture adds, before the norm after it."""
        if self.mixture is not None:
            return self.mixture(entered.normed())
        assert self.gate_up is not None
        assert self.down is not None
        return self.down.of_gate(entered.into(self.gate_up), gelu)

    def tensors(self) -> list[torch.Tensor]:
        """All weights and biases, kept as torch tensors."""
        norms = (self.attention_norm, self.head_norms, self.after_attention, self.mlp_norm, self.after_mlp, self.sinks)
        every = [*norms, *(each for linear in self.linears for each in (linear.weight, linear.bias))]
        parts = [part.tensors() for part in (self.mixture, self.delta_net, self.latent) if part is not None]
        return [*(each for each in every if each is not None), *(each for part in parts for each in part)]

    def native(self) -> Layer:
        """The same layer, without a mixture, in float32 with linear layers of `range_kernels`."""

        def wide(norm: torch.Tensor | None) -> torch.Tensor | None:
            return None if norm is None else norm.float()

        def packed(linear: Linear | None) -> Any:
            return None if linear is None else kernels.Linear(linear.weight, linear.bias)

        return Layer(
            wide(self.attention_norm), packed(self.qkv), wide(self.head_norms), packed(self.output), wide(self.after_attention),
            wide(self.mlp_norm), packed(self.gate_up), packed(self.down), wide(self.after_mlp),
        )  # fmt: skip


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

    def whole_layers(
        self, layers: Sequence[Layer], rotations: Iterable[tuple[torch.Tensor, torch.Tensor]], rows: int
    ) -> Sequence[Layer] | None:
        """The layers as `range_kernels.ops.decoder_layers` runs them on this many rows; None if it cannot, or is slower."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear: ...

    def norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) over the last dimension."""

    def add(self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, epsilon: float) -> Sum:
        """Add to the residual stream, to be normed: `hidden + added`, or `hidden` if there is nothing to add."""

    def position(
        self,
        heads: torch.Tensor,
        norms: torch.Tensor | None,
        queries: int,
        epsilon: float,
        rotation: Rotation | None,
        cache: KVCache | None,
    ) -> tuple[torch.Tensor, bool]:
        """Norm the heads of queries and keys, `[tokens, heads, head_dim]`, and rotate them; may write to `heads`.

        Args:
            norms: weights `[2, head_dim]` of the norms of the first `queries` heads and of the others; None: no norms.
            rotation: None: no rotation.
            cache: where keys and values may be written in the same launch; the values follow the heads in memory.

        Returns:
            the heads, and whether keys and values were written to the cache.
        """


class Rotation(NamedTuple):
    """Cosines and sines, float32 `[tokens, pairs]`, and whether a pair is two adjacent channels."""

    cosine: torch.Tensor
    sine: torch.Tensor
    interleaved: bool


class KVCache(NamedTuple):
    """Keys and values of one layer, `[slots, kv_heads, head_dim]`, and the slots of a batch's tokens, int64 `[tokens]`."""

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor


class Sum(Protocol):
    """The residual stream after an addition, `total` `[tokens, hidden]`, and its norm."""

    total: torch.Tensor

    def into(self, linear: Linear) -> torch.Tensor:
        """The linear layer of the norm."""

    def normed(self) -> torch.Tensor:
        """The norm."""


class _Separate:
    """A sum whose norm is computed with what follows."""

    def __init__(self, ops: Any, total: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
        self.total, self._ops, self._weight, self._epsilon = total, ops, weight, epsilon

    def into(self, linear: Linear) -> torch.Tensor:
        return linear.of_norm(self.total, self._weight, self._epsilon)

    def normed(self) -> torch.Tensor:
        return self._ops.norm(self.total, self._weight, self._epsilon)


class _Together:
    """A sum whose norm was computed with it."""

    def __init__(self, total: torch.Tensor, norm: torch.Tensor) -> None:
        self.total, self._norm = total, norm

    def into(self, linear: Linear) -> torch.Tensor:
        return linear(self._norm)

    def normed(self) -> torch.Tensor:
        return self._norm


class Unnormed:
    """A sum that is not normed before attention or MLP (OLMo 2)."""

    def __init__(self, total: torch.Tensor) -> None:
        self.total = total

    def into(self, linear: Linear) -> torch.Tensor:
        return linear(self.total)

    def normed(self) -> torch.Tensor:
        return self.total


class Centred:
    """A sum whose norm subtracts the mean (Ba et al. 2016, arXiv:1607.06450), computed in float32; it has no bias (Cohere)."""

    def __init__(self, total: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
        self.total, self._norm = total, layer_norm(total, weight, epsilon)

    def into(self, linear: Linear) -> torch.Tensor:
        return linear(self._norm)

    def normed(self) -> torch.Tensor:
        return self._norm


def layer_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """LayerNorm without a bias over the last dimension, computed in float32 and rounded to the dtype of `x`."""
    return F.layer_norm(x.float(), weight.shape, weight.float(), eps=epsilon).to(x.dtype)


class _Plain:
    """`add` and `position` as separate operations of a subclass."""

    norm: Any
    rotate: Any

    def whole_layers(
        self, layers: Sequence[Layer], rotations: Iterable[tuple[torch.Tensor, torch.Tensor]], rows: int
    ) -> Sequence[Layer] | None:
        return None

    def add(self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, epsilon: float) -> Sum:
        return _Separate(self, hidden if added is None else hidden + added, weight, epsilon)

    def position(
        self,
        heads: torch.Tensor,
        norms: torch.Tensor | None,
        queries: int,
        epsilon: float,
        rotation: Rotation | None,
        cache: KVCache | None,
    ) -> tuple[torch.Tensor, bool]:
        if norms is not None:
            parts = heads.split([queries, heads.shape[1] - queries], dim=1)
            heads = torch.cat(
                [self.norm(part, weight, epsilon) for part, weight in zip(parts, norms, strict=True)], dim=1
            )
        return heads if rotation is None else self.rotate(heads, *rotation), False


class CpuOperations(_Plain):
    """Kernels of `range_kernels`, for float32 on the CPU."""

    linear = staticmethod(kernels.Linear)
    norm = staticmethod(kernels.rms_norm)
    rotate = staticmethod(kernels.rotate)

    def whole_layers(
        self, layers: Sequence[Layer], rotations: Iterable[tuple[torch.Tensor, torch.Tensor]], rows: int
    ) -> Sequence[Layer] | None:
        return layers if _can_run_whole(layers, rotations) else None


def _can_run_whole(layers: Iterable[Layer], rotations: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether `range_kernels.ops.decoder_layers` can run these layers."""
    linears = (linear for layer in layers for linear in layer.linears)
    same_pairs = len({cosine.shape[-1] for cosine, _ in rotations}) <= 1
    return same_pairs and all(type(linear) is kernels.Linear and linear.whole_panels for linear in linears)


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


class TorchOperations(_Plain):
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


class CpuHalfOperations(TorchOperations):
    """bfloat16 on the CPU: torch's operations, whose matrix products use the processor's own for bfloat16; a decode step of few rows, in
    which every weight is read for little work, is one native call that computes in float32 with the same weights, of which it keeps a
    second copy. A trace, and so a verdict, runs torch's operations.
    """

    def __init__(self) -> None:
        self._native: list[Layer] = []
        self._made_from: list[tuple[torch.Tensor, int, int]] = []  # with version and address

    def whole_layers(
        self, layers: Sequence[Layer], rotations: Iterable[tuple[torch.Tensor, torch.Tensor]], rows: int
    ) -> Sequence[Layer] | None:
        if rows > FEW_ROWS:
            return None
        # Of tensors made in inference mode torch keeps no version.
        now = [
            (tensor, 0 if tensor.is_inference() else tensor._version, tensor.data_ptr())
            for layer in layers
            for tensor in layer.tensors()
        ]
        before = self._made_from
        same = len(now) == len(before) and all(
            a[0] is b[0] and a[1:] == b[1:] for a, b in zip(now, before, strict=True)
        )
        if not same:  # at first, and after weights were replaced or changed in place
            self._native, self._made_from = [layer.native() for layer in layers], now
        return self._native if _can_run_whole(self._native, rotations) else None


class GpuLinear(TorchLinear):
    """A linear layer by torch's matrix product, for one or two rows by a kernel of `range_kernels`, after a gated activation in one kernel."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._suits(x):
            return F.linear(x, self.weight, self.bias)
        out = x.new_empty(len(x), len(self.weight))
        row_products().launch(x, self.weight, self.bias, out)
        return out

    def _suits(self, x: torch.Tensor) -> bool:
        """Whether the kernel for few rows can read `x` `[rows, inputs]` and the weight."""
        weight = self.weight
        return (
            0 < len(x) <= row_products().MOST_ROWS  # for three and four rows cuBLAS is as fast
            and x.dtype is weight.dtype
            and x.dtype is not torch.float32
            and not weight.shape[1] % 8
            and x.is_contiguous()
            and weight.is_contiguous()
            and not (x.data_ptr() | weight.data_ptr()) % 16
        )

    def of_gate(self, both: torch.Tensor, gelu: bool) -> torch.Tensor:
        out = both.new_empty((len(both), both.shape[1] // 2))
        layer_ops().launch_gate(both, out, gelu)
        return self(out)


class InvariantLinear(GpuLinear):
    """A linear layer whose rows have the same bits however many run together: torch's grouped product, of one group.

    Its kernels add up an output's terms in one order, whatever the number of rows (measured for 1 to 4,096 rows; test_gpu_deterministic).
    """

    _counts: ClassVar[dict[tuple[torch.device, int], torch.Tensor]] = {}  # numbers of rows on the device, of all layers

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        key = (x.device, len(x))
        count = self._counts.get(key)
        if count is None:
            count = self._counts[key] = torch.full((1,), len(x), dtype=torch.int32, device=x.device)
        out = F.grouped_mm(x, self.weight[None].transpose(1, 2), offs=count)
        return out if self.bias is None else out + self.bias


class GpuOperations(TorchOperations):
    """Kernels of `range_kernels` between torch's matrix products, on a GPU: one launch each.

    What they get comes from matrix products and kernels, whose rows are contiguous and aligned; the checks of `range_kernels.ops` would
    take as long as the launches.
    """

    norm = staticmethod(kernels.rms_norm)

    def __init__(self, deterministic: bool = False) -> None:
        self.linear = InvariantLinear if deterministic else GpuLinear

    def add(self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, epsilon: float) -> Sum:
        if added is None:
            hidden = hidden.contiguous()
            return _Together(hidden, kernels.rms_norm(hidden, weight, epsilon))
        total, out = torch.empty_like(hidden), torch.empty_like(hidden)
        layer_ops().launch_norm(hidden, added, weight, total, out, epsilon)
        return _Together(total, out)

    def position(
        self,
        heads: torch.Tensor,
        norms: torch.Tensor | None,
        queries: int,
        epsilon: float,
        rotation: Rotation | None,
        cache: KVCache | None,
    ) -> tuple[torch.Tensor, bool]:
        if rotation is None:
            return super().position(heads, norms, queries, epsilon, rotation, cache)
        layer_ops().launch_rotate(heads, *rotation, norms, queries, epsilon, cache)
        return heads, cache is not None


@cache
def layer_ops() -> Any:
    """The GPU kernels; they can be imported only where numba-cuda is."""
    from range_kernels.cuda import layer_ops

    return layer_ops


@cache
def row_products() -> Any:
    """The GPU's products of few rows."""
    from range_kernels.cuda import row_products

    return row_products


def operations(
    dtype: torch.dtype, device: torch.device, widths: Sequence[int], deterministic: bool = False
) -> Operations:
    """Return the operations for this dtype on this device.

    Args:
        widths: of the rows that are normed or gated.
        deterministic: on a GPU, no bit of a row may depend on the other rows.

    Raises:
        ModelError: `deterministic` on a GPU for another dtype than bfloat16, or widths that are not multiples of 8.
    """
    if device.type == "cuda":
        odd = [width for width in widths if width % 8]
        if deterministic and (dtype is not torch.bfloat16 or odd):
            what = f"widths of {odd}" if odd else str(dtype).removeprefix("torch.")
            raise ModelError(
                f"deterministic=True on a GPU needs bfloat16 and widths that are multiples of 8, not {what}"
            )
        return TorchOperations() if odd else GpuOperations(deterministic)
    return CpuOperations() if dtype is torch.float32 else TorchOperations()
