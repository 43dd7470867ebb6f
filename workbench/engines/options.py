"""What engines and towers are opened with: a device and a dtype, refused by name where they cannot be had."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ModelError


def parse_device(name: str | torch.device, engine: str) -> torch.device:
    """`"cuda"` -> `torch.device("cuda")`, refusing what is not there."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"device={name!r} is no device: the {engine} engine runs on 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device={name!r}: the {engine} engine runs on 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device={name!r}: PyTorch {torch.__version__} sees no CUDA GPU here; use device='cpu'")
    return device


def parse_dtype(name: str | torch.dtype, allowed: Sequence[str], engine: str) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`, refusing what the engine does not run in."""
    short = str(name).removeprefix("torch.")
    if short not in allowed:
        raise ValueError(f"dtype={short!r}: the {engine} engine runs in {', '.join(allowed)}")
    return getattr(torch, short)
