"""How much memory a model's weights take, and how much a device has free."""

from __future__ import annotations

import psutil
import torch

from ...models import Model
from ...models.quantization import quantization_settings


def weight_bytes(model: Model, dtype: torch.dtype) -> int:
    """Bytes of a model's weights in a dtype. Packed codes of four bits count as eight weights."""
    packed = 8 if quantization_settings(model.config) is not None else 1
    entries = model.weights.entries(model.weights).values()
    counts = (entry.bytes // entry.dtype.itemsize * (packed if entry.dtype is torch.int32 else 1) for entry in entries)
    return sum(counts) * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that a device has free, with what torch keeps for itself and does not use."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
