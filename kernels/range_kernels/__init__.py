"""CPU and CUDA kernels for prompts with injected embeddings.

`splice` builds hidden state 0, the input of the first decoder layer, from token ids and injected rows. `attention` and
`paged_attention` take their mask as two integers per query. All take and return torch tensors, whose device selects the
kernel. Nothing here depends on models or engines.
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
