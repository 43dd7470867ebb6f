"""A fused splice in Triton, as a user would write it: the baseline of the Numba kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch installs it only on Linux with CUDA
    triton = tl = None

_BLOCK = 2048  # channels per program


def triton_jobs(
    ids: list[torch.Tensor], table: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, out: torch.Tensor
) -> dict[str, Callable[[int], object]]:
    """Return `{"fused Triton": job}`, or `{}` if Triton is not installed; `job(copy)` splices `ids[copy]` into `out`.

    `rows` are all items concatenated, `places` the positions of their tokens. Which row belongs to which token is
    computed here, outside the timing.
    """
    if triton is None:
        return {}
    tokens, hidden = out.shape
    source = torch.full((tokens,), -1, dtype=torch.int32, device=out.device)
    source[places] = torch.arange(len(rows), dtype=torch.int32, device=out.device)
    kernel, blocks = _kernel(), -(-hidden // _BLOCK)

    def run(copy: int) -> torch.Tensor:
        kernel[(tokens, blocks)](ids[copy], source, table, rows, out, hidden, BLOCK=_BLOCK, num_warps=4)
        return out

    return {"fused Triton": run}


def _kernel() -> Any:
    @triton.jit
    def fused(ids, source, table, rows, out, hidden, BLOCK: tl.constexpr):  # type: ignore[name-defined]
        token = tl.program_id(0).to(tl.int64)
        channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = channel < hidden
        row = tl.load(source + token)
        if row >= 0:
            values = tl.load(rows + row.to(tl.int64) * hidden + channel, mask=inside)
        else:
            values = tl.load(table + tl.load(ids + token) * hidden + channel, mask=inside)
        tl.store(out + token * hidden + channel, values, mask=inside)

    return fused
