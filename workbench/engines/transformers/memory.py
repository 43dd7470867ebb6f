"""How much memory a model's weights take, and how much a device has free."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from ...models import Model
from ...models.quantization import quantization_settings


def weight_bytes(model: Model, dtype: torch.dtype) -> int:
    """Bytes of a model's weights in a dtype. Packed integers of quantized checkpoints count as codes of four bits."""
    packed = {torch.int32: 8, torch.uint8: 2} if quantization_settings(model.config) is not None else {}
    entries = model.weights.entries(model.weights).values()
    counts = (entry.bytes // entry.dtype.itemsize * packed.get(entry.dtype, 1) for entry in entries)
    return sum(counts) * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that a device has free: on a GPU with what torch keeps and does not use; on the CPU within the limits of process and container."""
    if device.type == "cpu":
        return max(min([psutil.virtual_memory().available, *_limits()]), 0)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _limits() -> list[int]:
    """What a container (cgroup, version 2) and the process's own limit on data (`ulimit -d`) leave; none elsewhere than on Linux."""
    if sys.platform != "linux":
        return []
    import resource

    left = []
    with suppress(OSError, ValueError):  # no cgroup, or no limit ("max")
        group = Path("/sys/fs/cgroup")
        left.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit != resource.RLIM_INFINITY:
        status = Path("/proc/self/status").read_text().splitlines()
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
        left.append(limit - used)
    return left
