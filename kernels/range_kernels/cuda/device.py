"""What a GPU has, torch tensors as Numba device arrays, and the stream to launch on."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from numba import cuda

from .ptx import SIMULATED

if not SIMULATED:
    from numba.cuda.core import config

    config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # a decode step fills a fraction of the GPU; that is no beginner's error


def as_array(tensor: torch.Tensor):
    """A view that Numba takes: bfloat16 goes as its int16 bits, for which alone PyTorch exports an interface."""
    tensor = tensor.detach()
    tensor = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
    return tensor.numpy() if SIMULATED else cuda.as_cuda_array(tensor, sync=False)


def stream(tensor: torch.Tensor):
    """PyTorch's current stream of the tensor's device; 0 in the simulator, which has none."""
    return 0 if SIMULATED else _external(torch.cuda.current_stream(tensor.device).cuda_stream)


@lru_cache(maxsize=64)
def _external(handle: int):
    return cuda.external_stream(handle)


@cache
def multiprocessors(device: int) -> int:
    """How many a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def block_room(device: int) -> int:
    """Bytes of shared memory that one block may ask for: 227 KiB on an H100, 163 on an A100, 99 on GeForce 30 and 40."""
    properties: Any = torch.cuda.get_device_properties(device)  # whose types lack this one
    return properties.shared_memory_per_block_optin
