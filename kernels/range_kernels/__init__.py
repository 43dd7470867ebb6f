"""Kernels for embedding injection: splice rows into a prompt's hidden state 0, and attention whose mask is two ints a token.

Torch tensors in and out; the device of the tensors selects the kernel. Nothing here knows of models or engines.
"""

from .attention import attention
from .hugging_face import register_with_transformers
from .pages import KVPages, PagedPlan, paged_attention
from .splice import SplicePlan, splice
from .standing import StandingPlan
from .visibility import visible_keys

__all__ = [
    "KVPages",
    "PagedPlan",
    "SplicePlan",
    "StandingPlan",
    "attention",
    "paged_attention",
    "register_with_transformers",
    "splice",
    "visible_keys",
]
