"""Random attention cases and the error bound that results must meet."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from range_kernels import visible_keys
from range_kernels.reference import attention as reference_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: list[int]
    cu_seqlens_k: list[int]
    key_start: torch.Tensor
    key_stop: torch.Tensor
    softcap: float

    @property
    def args(self):
        return self.q, self.k, self.v, self.cu_seqlens_q, self.cu_seqlens_k

    def expected(self) -> np.ndarray:
        """The float64 reference on the same inputs, which are already rounded to the dtype."""
        return reference_attention(
            *(x.double().cpu().numpy() for x in self.args[:3]),
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            key_start=self.key_start.cpu().numpy(),
            key_stop=self.key_stop.cpu().numpy(),
            scale=self.q.shape[-1] ** -0.5,
            softcap=self.softcap,
        )

    def to(self, device: str) -> Case:
        moved = {name: getattr(self, name).to(device) for name in ("q", "k", "v", "key_start", "key_stop")}
        return Case(**{**self.__dict__, **moved})


def make_case(
    seed: int,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    spans: list[list[tuple[int, int]]] | None = None,
    window: int | None = None,
    window_rule: str = "inside",
    softcap: float = 0.0,
) -> Case:
    """`lengths`: (queries, keys) of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    cu_q = [0, *np.cumsum([queries for queries, _ in lengths]).tolist()]
    cu_k = [0, *np.cumsum([keys for _, keys in lengths]).tolist()]

    def normal(tokens, count):
        return torch.randn(tokens, count, head_dim, generator=generator).mul(1.5).to(dtype)

    bounds = [
        visible_keys(keys, spans[i] if spans else (), first=keys - queries, window=window, window_rule=window_rule)
        for i, (queries, keys) in enumerate(lengths)
    ]
    return Case(
        normal(cu_q[-1], heads[0]),
        normal(cu_k[-1], heads[1]),
        normal(cu_k[-1], heads[1]),
        cu_q,
        cu_k,
        torch.from_numpy(np.concatenate([key_start for key_start, _ in bounds])),
        torch.from_numpy(np.concatenate([key_stop for _, key_stop in bounds])),
        softcap,
    )


def plain_torch(case: Case, channels: torch.Tensor | None = None) -> torch.Tensor:
    """The plain torch code a user would write: float32 scores, dense mask, softmax, rounded to the dtype at the end.

    If `channels` (a permutation of the head dimension) is given, the products of a score are added sequentially in that
    order. torch's matrix product does this for many queries; for few queries it keeps several partial sums, which round
    far less.
    """
    q, k, v = (x.float().cpu() for x in case.args[:3])
    key_start, key_stop = case.key_start.cpu(), case.key_stop.cpu()
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(pairwise(case.cu_seqlens_q), pairwise(case.cu_seqlens_k), strict=True):
        keys, values = (x[c:d].repeat_interleave(group, dim=1) for x in (k, v))
        if channels is None:
            scores = torch.einsum("qhd,khd->hqk", q[a:b], keys)
        else:
            scores = torch.zeros(q.shape[1], b - a, d - c)
            for channel in channels:
                scores += q[a:b, :, channel].T[:, :, None] * keys[:, :, channel].T[:, None, :]
        scores = scores * q.shape[-1] ** -0.5
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        key = torch.arange(d - c)
        visible = (key >= key_start[a:b, None]) & (key < key_stop[a:b, None])
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
        out[a:b] = torch.einsum("hqk,khd->qhd", weights, values)
    return out.to(case.q.dtype)


def assert_close(out: torch.Tensor, case: Case, factor: float = 4.0) -> None:
    """Each row's relative error against float64 is at most `factor` times plain torch's largest (or the dtype's eps).

    With only one or two rows, plain torch's largest error can be small by chance. If the first comparison fails, it is
    therefore taken over several summation orders.
    """
    expected = case.expected()

    def worst(state: torch.Tensor) -> float:
        error = np.linalg.norm(state.double().cpu().numpy() - expected, axis=-1)
        return float((error / np.maximum(np.linalg.norm(expected, axis=-1), 1e-30)).max())

    assert out.dtype == case.q.dtype
    assert out.isfinite().all()
    allowed = factor * max(worst(plain_torch(case)), torch.finfo(out.dtype).eps)
    if worst(out) > allowed:
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(case.q.shape[-1], generator=generator) for _ in range(8)]
        allowed = max([allowed, *(factor * worst(plain_torch(case, order)) for order in orders)])
    assert worst(out) <= allowed, f"relative error {worst(out):.1e} above {allowed:.1e}"
