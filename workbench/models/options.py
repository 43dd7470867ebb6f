"""Parse the device and dtype that engines and towers are opened with; errors name what is unavailable."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ModelError


def parse_device(name: str | torch.device, engine: str) -> torch.device:
    """`"cuda"` -> `torch.device("cuda")`, refusing unavailable devices."""
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
    """`"bfloat16"` -> `torch.bfloat16`, refusing dtypes that the engine does not run in."""
    short = str(name).removeprefix("torch.")
    if short not in allowed:
        raise ValueError(f"dtype={short!r}: the {engine} engine runs in {', '.join(allowed)}")
    return getattr(torch, short)
