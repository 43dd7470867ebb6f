"""A decoder's operations other than attention, in float32 on the CPU: linear, RMSNorm, gated activation, rotary.

The result of a row is bit-identical whatever other rows are in the batch.
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
    """`x / sqrt(mean(x**2) + epsilon) * weight` over the last dimension of `x` `[..., width]`; `weight` `[width]`."""
    _check("x", x, x.ndim)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)} for rows {x.shape[-1]} wide: make the widths equal")
    return launch.rms_norm(x.contiguous(), weight.contiguous(), epsilon)


def gate(both: torch.Tensor, gelu: bool = False) -> torch.Tensor:
    """`activation(both[:, :n]) * both[:, n:]` for `both` `[rows, 2 n]`; SiLU, or tanh-approximated GELU if `gelu`."""
    _check("both", both, 2)
    if both.shape[1] % 2:
        raise ValueError(f"both is {tuple(both.shape)}: gate and up must be equally wide")
    return launch.gate(both, gelu)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotary embedding of `x` `[tokens, heads, head_dim]` by float32 `cosine`, `sine` `[tokens, pairs]`.

    A pair is two neighbouring channels (`interleaved`) or channels i and i + pairs; channels past the pairs are unchanged.
    """
    _check("x", x, 3)
    for name, given in (("cosine", cosine), ("sine", sine)):
        if given.ndim != 2 or len(given) != len(x) or 2 * given.shape[1] > x.shape[2]:
            raise ValueError(f"{name} is {tuple(given.shape)} for x {tuple(x.shape)}: expected [tokens, pairs]")
    return launch.rotate(x, cosine.contiguous(), sine.contiguous(), interleaved)


def _check(name: str, x: torch.Tensor, dimensions: int) -> None:
    if x.ndim != dimensions or x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}: expected {dimensions}-D float32 on the CPU"
        )
