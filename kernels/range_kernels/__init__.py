"""Kernels for embedding injection: splice rows into a prompt's hidden state 0, and attention whose mask is two integers per query.

The functions take and return torch tensors, whose device selects the kernel. Nothing here depends on models or engines.
"""

from .attention import attention
from .kv_cache import KVPages
from .paged_attention import paged_attention
from .plans import CUDAGraphPlan, PagedPlan
from .splice import SplicePlan, splice
from .transformers_attention import register_with_transformers
from .visibility import visible_keys

__all__ = [
    "CUDAGraphPlan",
    "KVPages",
    "PagedPlan",
    "SplicePlan",
    "attention",
    "paged_attention",
    "register_with_transformers",
    "splice",
    "visible_keys",
]
