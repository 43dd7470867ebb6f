"""Properties of a GPU, torch tensors as Numba device arrays, and the stream to launch on."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from numba import cuda

from .ptx import SIMULATED

if not SIMULATED:
    from numba.cuda.core import config

    config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # a decode step legitimately fills only a fraction of the GPU


def as_array(tensor: torch.Tensor):
    """Return a view that Numba accepts: bfloat16 as its int16 bits, since PyTorch exports no array interface for bfloat16."""
    tensor = tensor.detach()
    tensor = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
    return tensor.numpy() if SIMULATED else cuda.as_cuda_array(tensor, sync=False)


def stream(tensor: torch.Tensor):
    """Return PyTorch's current stream of the tensor's device; 0 in the simulator, which has none."""
    return 0 if SIMULATED else _external(torch.cuda.current_stream(tensor.device).cuda_stream)


@lru_cache(maxsize=64)
def _external(handle: int):
    return cuda.external_stream(handle)


@cache
def multiprocessors(device: int) -> int:
    """Return the number of multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def max_smem_per_block(device: int) -> int:
    """Return the bytes of shared memory that one block may request: 227 KiB on an H100, 163 on an A100, 99 on GeForce 30 and 40."""
    properties: Any = torch.cuda.get_device_properties(device)  # the type stubs lack this property
    return properties.shared_memory_per_block_optin


@cache
def is_hopper(device: int) -> bool:
    """Whether a GPU has compute capability 9."""
    return torch.cuda.get_device_capability(device)[0] == 9
