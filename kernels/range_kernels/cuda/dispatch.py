"""Choose the attention kernel, called a path, for a GPU and a call; all other files use this one.

"hopper" is `prefill_sm90`; "tensor-core" is `prefill_sm80`, and for decode steps `decode_split_kv`; "plain" is
`prefill_simt`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from . import prefill_simt
from .ptx import SIMULATED

PATHS = ("hopper", "tensor-core", "plain")
FEW_QUERIES = 64  # with fewer in the longest sequence, a block of 128 rows is mostly empty


def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, path: str | None = None) -> None:
    """Run the fastest kernel that supports this call, or the one that `path` names; arguments as in `prefill_simt.launch`.

    Raises:
        ValueError: the named path does not support this call.
    """
    cu_seqlens_q, scale = rest[3], rest[-2]
    chosen = choose_path(q, scale, path, int(np.diff(cu_seqlens_q).max()))
    if chosen == "plain":
        prefill_simt.launch(q, k, v, *rest)
        return
    from . import prefill_sm80

    prefill_sm80.launch(prefill_kernel(chosen), q, k, v, *rest)


def prefill_kernel(path: str) -> Callable[..., Any]:
    """Return the function `compiled(head_dim, dtype, softcap, paged, device)` of a path other than "plain"."""
    from . import prefill_sm80, prefill_sm90

    return prefill_sm90.compiled if path == "hopper" else prefill_sm80.compiled


def choose_path(q: torch.Tensor, scale: float, path: str | None = None, max_seqlen_q: int = 1) -> str:
    """Return `path`, or if it is None the fastest path that supports the call.

    Args:
        q: `[queries, q_heads, head_dim]`; its dtype, head size and device count.
        scale: factor on scores.
        max_seqlen_q: number of queries of the longest sequence.

    Raises:
        ValueError: the named path does not support this call.
    """
    if path == "plain" or (path is None and SIMULATED):
        return "plain"
    from . import prefill_sm80, prefill_sm90

    wanted = path == "hopper" or (path is None and max_seqlen_q >= FEW_QUERIES)
    if wanted and prefill_sm90.can_run(q, scale):
        return "hopper"
    if path in (None, "tensor-core") and prefill_sm80.can_run(q, scale):
        return "tensor-core"
    if path is None:
        return "plain"
    raise ValueError(
        f"path={path!r} does not compute {q.dtype}, head_dim={q.shape[2]}, scale={scale} on "
        f"{torch.cuda.get_device_name(q.device)}: paths are {', '.join(PATHS)}. tensor-core needs float16 or bfloat16, "
        f"head_dim in {prefill_sm80.HEAD_DIMS}, a positive scale and compute capability 8.0 or later, and for head_dim 256 "
        f"{prefill_sm80.Shape(64, 1).total_smem_bytes(256)} bytes of shared memory per block; hopper also needs "
        f"head_dim in {prefill_sm90.HEAD_DIMS} and compute capability 9"
    )
