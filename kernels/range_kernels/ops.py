"""A decoder's operations other than attention: linear (float32 on the CPU), RMSNorm, gated activation, rotary embedding.

On the CPU they take float32, on a GPU float32, float16 or bfloat16; there numbers are computed in float32 and rounded once per operation
that a formula names. The result of a row is bit-identical whatever other rows are in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .cpu import launch
from .kv_cache import KVPages
from .plans import PagedPlan


class Linear:
    """`x @ weight.T + bias`, with the weights packed once into the kernel's layout.

    Weights that bfloat16 represents exactly, as those of most checkpoints, are kept in it; results have the same bits as in float32.

    Args:
        weight: `[outputs, inputs]`, converted to float32.
        bias: `[outputs]` or None.

    Attributes:
        outputs, inputs: the weight's shape.
        panels: the packed weight, at `address`.
        whole_panels: whether the outputs fill the panels, as `decoder_layers` needs.

    Raises:
        ValueError: the weight is empty or does not have two axes.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.bias = None if bias is None else bias.float()
        self.weight = weight

    @property
    def weight(self) -> torch.Tensor:
        """A copy of the weight, `[outputs, inputs]`."""
        panels = self.panels
        if panels.dtype == np.uint16:
            panels = (panels.astype(np.uint32) << 16).view(np.float32)
        flat = torch.from_numpy(panels).transpose(1, 2).flatten(0, 1)
        return flat[: self.outputs].contiguous()

    @weight.setter
    def weight(self, weight: torch.Tensor) -> None:
        if weight.ndim != 2 or 0 in weight.shape:
            raise ValueError(f"weight is {tuple(weight.shape)}: expected [outputs, inputs]")
        self.outputs, self.inputs = weight.shape
        self.panels = launch.pack_weights(weight)
        self.address = self.panels.ctypes.data
        self.whole_panels = self.outputs % self.panels.shape[2] == 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` float32 `[rows, inputs]` -> `[rows, outputs]`.

        Raises:
            ValueError: `x` has another shape, dtype or device.
        """
        self._check(x, 1)
        return self._biased(launch.linear(x.detach(), self.panels, self.outputs))

    def of_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return `self(rms_norm(x, weight, epsilon))`, bit-identical to the two calls and faster for few rows.

        `x` is float32 `[rows, inputs]`, `weight` `[inputs]`.
        """
        self._check(x, 1)
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"weight is {tuple(weight.shape)} for rows {x.shape[-1]} wide: make the widths equal")
        x, weight = x.detach().contiguous(), weight.contiguous()
        return self._biased(launch.linear_of_norm(x, weight, epsilon, self.panels, self.outputs))

    def of_gate(self, both: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """Return `self(gate(both, gelu))`, bit-identical to the two calls and faster for few rows.

        `both` is float32 `[rows, 2 * inputs]`.
        """
        self._check(both, 2)
        return self._biased(launch.linear_of_gate(both.detach().contiguous(), gelu, self.panels, self.outputs))

    def _check(self, x: torch.Tensor, times: int) -> None:
        _check("x", x, 2)
        inputs = times * self.panels.shape[1]
        if x.shape[1] != inputs:
            raise ValueError(f"x is {tuple(x.shape)}: expected [rows, {inputs}]")

    def _biased(self, out: torch.Tensor) -> torch.Tensor:
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True)
class LayerSettings:
    """What the layers of `decoder_layers` have in common, and for each layer its rotation and its window.

    Attributes:
        epsilon: of the norms. gelu: as for `gate`. softcap, scale: as for `paged_attention`.
        rotations: for each kind of rotation its cosines and sines, float32 `[tokens, pairs]`, and `interleaved` as for `rotate`.
        rope_of: for each layer its index in `rotations`; -1: no rotation.
        key_starts: for each kind of window int32 `[tokens]`; window_of: for each layer its index there.
        key_stop: int32 `[tokens]`.
    """

    epsilon: float
    gelu: bool
    softcap: float
    scale: float
    rotations: Sequence[tuple[torch.Tensor, torch.Tensor, bool]]
    rope_of: Sequence[int]
    key_starts: Sequence[torch.Tensor]
    window_of: Sequence[int]
    key_stop: torch.Tensor


def decoder_layers(
    hidden: torch.Tensor, layers: Sequence[Any], settings: LayerSettings, pages: KVPages, plan: PagedPlan
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Run decoder layers on the CPU in one native call, bit-identical to the separate operations; keys and values go into `pages`.

    Args:
        hidden: float32 `[tokens, hidden]`, hidden state 0.
        layers: each has the attributes `qkv`, `output`, `gate_up` and `down` (`Linear`); `attention_norm`, `after_attention`, `mlp_norm`
            and `after_mlp` (float32 `[hidden]`; None for a layer without one of those after); `head_norms` (`[2, head_dim]`, of queries and
            of keys, or None).
        pages, plan: as for `paged_attention`.

    Returns:
        the residual stream after the last layer's attention, and what its MLP adds: two tensors `[tokens, hidden]`. None if Numba's
        threads cannot run at the same time, for example because of OMP_THREAD_LIMIT: use the separate operations then.

    Raises:
        ValueError: not float32 on the CPU, outputs of a `Linear` that do not fill its panels (`Linear.whole_panels`), or shapes that
            do not fit together.
    """
    _check("hidden", hidden, 2)
    tokens, width = hidden.shape
    ropes, pairs = len(settings.rotations), {x.shape[1] for each in settings.rotations for x in each[:2]}
    of_tokens = [x for each in settings.rotations for x in each[:2]] + [*settings.key_starts, settings.key_stop]
    if plan.queries != tokens or any(len(x) != tokens for x in of_tokens) or len(pairs) > 1:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)}, the plan has {plan.queries} queries, rotations, key_starts and key_stop are "
            f"{[tuple(x.shape) for x in of_tokens]}: make the numbers of tokens equal, and the numbers of pairs"
        )
    plan.check(pages, settings.scale, None)
    if len(layers) != len(pages.keys) or {len(layers)} != {len(settings.rope_of), len(settings.window_of)}:
        raise ValueError(
            f"{len(layers)} layers, rotations for {len(settings.rope_of)}, windows for {len(settings.window_of)}, pages for "
            f"{len(pages.keys)}: make them equal"
        )
    if not (
        all(-1 <= each < ropes for each in settings.rope_of)
        and all(0 <= each < len(settings.key_starts) for each in settings.window_of)
    ):
        raise ValueError(f"rope_of is {settings.rope_of} and window_of {settings.window_of}: indices are out of range")
    intermediate = layers[0].down.inputs
    heads = (plan.q_heads + 2 * pages.kv_heads) * pages.head_dim
    shapes = ((heads, width), (width, plan.q_heads * pages.head_dim), (2 * intermediate, width), (width, intermediate))
    kept: list[torch.Tensor] = []  # until the call has returned
    table = np.asarray(
        [_addresses(number, layer, shapes, pages.head_dim, kept) for number, layer in enumerate(layers)], np.int64
    )
    rotations = (
        torch.stack([torch.stack(each[:2]) for each in settings.rotations]) if ropes else hidden.new_empty(1, 2, 0, 0)
    )
    total, added = hidden.clone(memory_format=torch.contiguous_format), torch.empty_like(hidden)
    ran = launch.decoder_layers(
        total, added, table, rotations, np.asarray([each[2] for each in settings.rotations] or [False]), np.asarray(settings.rope_of),
        torch.stack(list(settings.key_starts)), np.asarray(settings.window_of), settings.key_stop, pages, plan, intermediate,
        settings.epsilon, settings.gelu, settings.softcap, settings.scale,
    )  # fmt: skip
    return (total, added) if ran else None


def _addresses(
    number: int, layer: Any, shapes: Sequence[tuple[int, int]], head_dim: int, kept: list[torch.Tensor]
) -> list[int]:
    """A layer's row of the table of `cpu/layer.py`; tensors that had to be copied are appended to `kept`."""
    for name in ("attention_norm", "mlp_norm"):
        if getattr(layer, name) is None:
            raise ValueError(
                f"{name} of layer {number} is None: only after_attention, after_mlp and head_norms may be left out"
            )
    linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
    for name, linear, shape in zip(("qkv", "output", "gate_up", "down"), linears, shapes, strict=True):
        if (linear.outputs, linear.inputs) != shape or not linear.whole_panels:
            raise ValueError(
                f"{name} of layer {number} is {(linear.outputs, linear.inputs)}: expected {shape}, in whole panels"
            )

    def address(x: torch.Tensor | None, *shape: int) -> int:
        if x is None:
            return 0
        if x.shape != shape or x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(
                f"a weight of layer {number} is {x.dtype} {tuple(x.shape)} on {x.device}: expected float32 {shape}"
            )
        if not x.is_contiguous():
            x = x.contiguous()
            kept.append(x)
        return x.data_ptr()

    width = shapes[0][1]
    norms = [address(x, width) for x in (layer.attention_norm, layer.after_attention, layer.mlp_norm, layer.after_mlp)]
    biases = [address(linear.bias, linear.outputs) for linear in linears]
    bf16 = [int(linear.panels.dtype == np.uint16) for linear in linears]
    return [*norms, *(linear.address for linear in linears), *biases, address(layer.head_norms, 2, head_dim), *bf16]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`x / sqrt(mean(x**2) + epsilon) * weight` over the last dimension of `x` `[..., width]`; `weight` `[width]`.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.

    Raises:
        ValueError: widths differ; a device or dtype without a kernel; on a GPU rows that are not a multiple of 8 wide or not aligned.
    """
    _check("x", x, x.ndim)
    _check_weight(x, weight)
    if x.device.type == "cpu":
        return launch.rms_norm(x.contiguous(), weight.contiguous(), epsilon)
    from .cuda import layer_ops

    x, weight = _wide(x=x, weight=weight)
    out = torch.empty_like(x)
    layer_ops.launch_norm(x, None, weight, None, out, epsilon)
    return out


def add_rms_norm(
    x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x + added` and its `rms_norm`, bit-identical to the two calls; on a GPU in one launch.

    Raises:
        ValueError: as for `rms_norm`, or shapes or dtypes of `x` and `added` differ.
    """
    if added.shape != x.shape or added.dtype is not x.dtype or added.device != x.device:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} and added {added.dtype} {tuple(added.shape)}: make shapes, dtypes and devices equal"
        )
    if x.device.type == "cpu":
        total = x + added
        return total, rms_norm(total, weight, epsilon)
    _check("x", x, x.ndim)
    _check_weight(x, weight)
    from .cuda import layer_ops

    x, added, weight = _wide(x=x, added=added, weight=weight)
    total, out = torch.empty_like(x), torch.empty_like(x)
    layer_ops.launch_norm(x, added, weight, total, out, epsilon)
    return total, out


def gate(both: torch.Tensor, gelu: bool = False) -> torch.Tensor:
    """`activation(both[:, :n]) * both[:, n:]`, `[rows, n]`, for `both` `[rows, 2 n]`; SiLU, or tanh-approximated GELU if `gelu`.

    Raises:
        ValueError: an odd width; a device or dtype without a kernel; on a GPU `n` is not a multiple of 8, or rows do not begin at a
            multiple of 16 bytes.
    """
    _check("both", both, 2)
    if both.shape[1] % 2:
        raise ValueError(f"both is {tuple(both.shape)}: gate and up must be equally wide")
    if both.device.type == "cpu":
        return launch.gate(both, gelu)
    from .cuda import layer_ops

    (both,) = _wide(both=both)
    out = both.new_empty((len(both), both.shape[1] // 2))
    _wide(half=out)
    if out.numel():
        layer_ops.launch_gate(both, out, gelu)
    return out


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """`1 / (1 + exp(-x))`; on the CPU in float32 no element depends on where it is in the tensor, as with torch's vector instructions."""
    return _elementwise(x, torch.sigmoid, launch.ops.sigmoid)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """`log(1 + exp(x))`; on the CPU in float32 as `sigmoid`."""
    return _elementwise(x, torch.nn.functional.softplus, launch.ops.softplus)


def _elementwise(x: torch.Tensor, otherwise: Any, kernel: Any) -> torch.Tensor:
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
        return otherwise(x)
    return launch.elementwise(x.detach().contiguous(), kernel)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotary embedding of `x` `[tokens, heads, head_dim]` by float32 `cosine`, `sine` `[tokens, pairs]`.

    A pair is two neighbouring channels (`interleaved`) or channels i and i + pairs; channels past the pairs are unchanged.
    """
    if x.device.type != "cpu":
        return rotate_heads(x.clone(memory_format=torch.contiguous_format), cosine, sine, interleaved)
    _check("x", x, 3)
    _check_angles(x, cosine, sine)
    return launch.rotate(x, cosine.contiguous(), sine.contiguous(), interleaved)


def rotate_heads(
    x: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    interleaved: bool = False,
    *,
    norms: torch.Tensor | None = None,
    queries: int = 0,
    epsilon: float = 0.0,
) -> torch.Tensor:
    """Norm and rotate heads in place on a GPU, in one launch: `rms_norm` of each head, rounded to its dtype, then `rotate`.

    Args:
        x: `[tokens, heads, head_dim]`; heads of a token are contiguous, tokens may be further apart (a part of stacked projections).
        cosine, sine: float32 `[tokens, pairs]`.
        norms: `[2, head_dim]`, weights of the norms of the first `queries` heads and of the others; None: heads are rotated only.

    Returns:
        `x`.

    Raises:
        ValueError: shapes do not fit together, or the tensors are not on a GPU.
    """
    _check("x", x, 3)
    _check_angles(x, cosine, sine)
    if x.device.type == "cpu" or x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        raise ValueError(
            f"x is on {x.device} with strides {x.stride()}: heads in place need a GPU, and contiguous heads of a token"
        )
    if norms is not None and norms.shape != (2, x.shape[2]):
        raise ValueError(f"norms is {tuple(norms.shape)} for heads of {x.shape[2]}: expected [2, head_dim]")
    from .cuda import layer_ops

    if x.numel():
        norms = None if norms is None else norms.contiguous()
        layer_ops.launch_rotate(x, cosine.contiguous(), sine.contiguous(), interleaved, norms, queries, epsilon)
    return x


def _check(name: str, x: torch.Tensor, dimensions: int) -> None:
    dtypes = (torch.float32,) if x.device.type == "cpu" else (torch.float32, torch.float16, torch.bfloat16)
    if x.ndim != dimensions or x.dtype not in dtypes or x.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}: expected {dimensions}-D float32 on the CPU, or float32, float16 or "
            "bfloat16 on a GPU"
        )


def _check_weight(x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)} for rows {x.shape[-1]} wide: make the widths equal")


def _check_angles(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
    for name, given in (("cosine", cosine), ("sine", sine)):
        if given.ndim != 2 or len(given) != len(x) or 2 * given.shape[1] > x.shape[2] or given.dtype != torch.float32:
            raise ValueError(
                f"{name} is {given.dtype} {tuple(given.shape)} for x {tuple(x.shape)}: expected float32 [tokens, pairs]"
            )


def _wide(**tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors, contiguous; ValueError if a kernel that reads eight numbers at a time cannot read one of them."""
    from .cuda.layer_ops import wide

    found = {name: each.contiguous() for name, each in tensors.items()}
    for name, each in found.items():
        if not wide(each):
            raise ValueError(
                f"{name} is {each.dtype} {tuple(each.shape)} at address {each.data_ptr():#x}: rows must be a multiple of 8 wide and aligned to 16 "
                "bytes"
            )
    return list(found.values())
