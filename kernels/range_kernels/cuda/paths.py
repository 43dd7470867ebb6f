"""Which attention kernel runs on which GPU and call: the one place that decides."""

from __future__ import annotations

from typing import Any

import torch

from . import attention as plain
from .ptx import SIMULATED

PATHS = ("tensor-core", "plain")


def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, path: str | None = None) -> None:
    """Run the fastest kernel that computes this call, or the one named; arguments as `plain.launch` takes them.

    Raises:
        ValueError: the named path does not compute this call.
    """
    if choose(q, rest[-2], path) == "plain":
        plain.launch(q, k, v, *rest)
        return
    from . import tensor_core

    tensor_core.launch(q, k, v, *rest)


def choose(q: torch.Tensor, scale: float, path: str | None = None) -> str:
    """The fastest path that computes a call, or the one named.

    Raises:
        ValueError: the named path does not compute this call.
    """
    if path == "plain" or (path is None and SIMULATED):
        return "plain"
    from . import tensor_core

    if path in (None, "tensor-core") and tensor_core.can_run(q, scale):
        return "tensor-core"
    if path is None:
        return "plain"
    raise ValueError(
        f"path={path!r} does not compute {q.dtype}, head_dim={q.shape[2]}, scale={scale} on "
        f"{torch.cuda.get_device_name(q.device)}: paths are {', '.join(PATHS)}, and tensor-core takes float16 and bfloat16, "
        f"head sizes {tensor_core.HEAD_DIMS}, a positive scale, and GPUs from compute capability 8.0 on"
    )
