"""Which attention kernel runs on which GPU and call: the one place that decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from . import attention as plain
from .ptx import SIMULATED

PATHS = ("hopper", "tensor-core", "plain")
_FEW_QUERIES = 64  # of the longest sequence: below, a block of 128 rows is mostly empty


def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, path: str | None = None) -> None:
    """Run the fastest kernel that computes this call, or the one named; arguments as `plain.launch` takes them.

    Raises:
        ValueError: the named path does not compute this call.
    """
    lengths_q, scale = rest[3], rest[-2]
    chosen = choose(q, scale, path, int(np.diff(lengths_q).max()))
    if chosen == "plain":
        plain.launch(q, k, v, *rest)
        return
    from . import tensor_core

    tensor_core.launch(prefill(chosen), q, k, v, *rest)


def prefill(path: str) -> Callable[..., Any]:
    """What compiles the prefill kernel of a path other than "plain"."""
    from . import hopper, tensor_core

    return hopper.compiled if path == "hopper" else tensor_core.compiled


def choose(q: torch.Tensor, scale: float, path: str | None = None, most_queries: int = 1) -> str:
    """The fastest path that computes a call, or the one named; `most_queries` of one sequence.

    Raises:
        ValueError: the named path does not compute this call.
    """
    if path == "plain" or (path is None and SIMULATED):
        return "plain"
    from . import hopper, tensor_core

    wanted = path == "hopper" or (path is None and most_queries >= _FEW_QUERIES)
    if wanted and hopper.can_run(q, scale):
        return "hopper"
    if path in (None, "tensor-core") and tensor_core.can_run(q, scale):
        return "tensor-core"
    if path is None:
        return "plain"
    raise ValueError(
        f"path={path!r} does not compute {q.dtype}, head_dim={q.shape[2]}, scale={scale} on "
        f"{torch.cuda.get_device_name(q.device)}: paths are {', '.join(PATHS)}; tensor-core takes float16 and bfloat16, "
        f"head sizes {tensor_core.HEAD_DIMS}, a positive scale, and GPUs from compute capability 8.0 on, for head size 256 with "
        f"{tensor_core.Shape(64, 1).all_room(256)} bytes of shared memory a block; hopper of those "
        f"the head sizes {hopper.HEAD_DIMS}, on compute capability 9"
    )
