"""A decoder's operations other than attention: linear (float32 on the CPU), RMSNorm, gated activation, rotary embedding.

On the CPU they take float32, on a GPU float32, float16 or bfloat16; there numbers are computed in float32 and rounded once per operation
that a formula names. The result of a row is bit-identical whatever other rows are in the batch.
"""

from __future__ import annotations

import torch

from .cpu import launch


class Linear:
    """`x @ weight.T + bias`, with the weights packed once into the kernel's layout.

    Args:
        weight: `[outputs, inputs]`, converted to float32.
        bias: `[outputs]` or None.

    Raises:
        ValueError: the weight is empty or does not have two axes.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.bias = None if bias is None else bias.float()
        self.weight = weight

    @property
    def weight(self) -> torch.Tensor:
        """A copy of the weight, `[outputs, inputs]`."""
        flat = torch.from_numpy(self._panels).transpose(1, 2).flatten(0, 1)
        return flat[: self._outputs].contiguous()

    @weight.setter
    def weight(self, weight: torch.Tensor) -> None:
        if weight.ndim != 2 or 0 in weight.shape:
            raise ValueError(f"weight is {tuple(weight.shape)}: expected [outputs, inputs]")
        self._outputs = len(weight)
        self._panels = launch.pack_weights(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` float32 `[rows, inputs]` -> `[rows, outputs]`.

        Raises:
            ValueError: `x` has another shape, dtype or device.
        """
        self._check(x, 1)
        return self._biased(launch.linear(x.detach(), self._panels, self._outputs))

    def of_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return `self(rms_norm(x, weight, epsilon))`, bit-identical to the two calls and faster for few rows.

        `x` is float32 `[rows, inputs]`, `weight` `[inputs]`.
        """
        self._check(x, 1)
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"weight is {tuple(weight.shape)} for rows {x.shape[-1]} wide: make the widths equal")
        x, weight = x.detach().contiguous(), weight.contiguous()
        return self._biased(launch.linear_of_norm(x, weight, epsilon, self._panels, self._outputs))

    def of_gate(self, both: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """Return `self(gate(both, gelu))`, bit-identical to the two calls and faster for few rows.

        `both` is float32 `[rows, 2 * inputs]`.
        """
        self._check(both, 2)
        return self._biased(launch.linear_of_gate(both.detach().contiguous(), gelu, self._panels, self._outputs))

    def _check(self, x: torch.Tensor, times: int) -> None:
        _check("x", x, 2)
        inputs = times * self._panels.shape[1]
        if x.shape[1] != inputs:
            raise ValueError(f"x is {tuple(x.shape)}: expected [rows, {inputs}]")

    def _biased(self, out: torch.Tensor) -> torch.Tensor:
        return out if self.bias is None else out + self.bias


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
    """`activation(both[:, :n]) * both[:, n:]` for `both` `[rows, 2 n]`; SiLU, or tanh-approximated GELU if `gelu`.

    Raises:
        ValueError: an odd width; a device or dtype without a kernel; on a GPU `n` is not a multiple of 8, or rows are not aligned.
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
