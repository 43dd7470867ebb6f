"""Parse the device and dtype that engines and vision towers are opened with; errors name what is not available."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ModelError


def parse_device(name: str | torch.device, engine: str) -> torch.device:
    """Convert a name to a device, `"cuda"` -> `torch.device("cuda")`. `engine` is the name in error messages.

    Raises:
        ModelError: not a CPU or CUDA device, or PyTorch finds no GPU.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"device={name!r} is not a device: the {engine} engine runs on 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device={name!r}: the {engine} engine runs on 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device={name!r}: PyTorch {torch.__version__} sees no CUDA GPU here; use device='cpu'")
    return device


def parse_dtype(name: str | torch.dtype, allowed: Sequence[str], engine: str) -> torch.dtype:
    """Convert a name to a dtype, `"bfloat16"` -> `torch.bfloat16`. `engine` is the name in error messages.

    Raises:
        ValueError: a dtype that is not in `allowed`.
    """
    short = str(name).removeprefix("torch.")
    if short not in allowed:
        raise ValueError(f"dtype={short!r}: the {engine} engine runs in {', '.join(allowed)}")
    return getattr(torch, short)
