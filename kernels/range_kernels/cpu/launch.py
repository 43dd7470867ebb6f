"""Call the CPU kernels on torch tensors."""

from __future__ import annotations

import threading

import numpy as np
import torch

from . import attention as kernels
from . import splice as splicing
from .vector import COLUMNS

# Numba's portable threading layer aborts the process when two threads enter parallel code at once.
_PARALLEL = threading.Lock()
# Two guesses, not measured: up to so many queries a sequence K and V are read unpacked, and under so many multiply-adds by
# one thread.
_DECODE_QUERIES = 4
_SMALL_WORK = 1 << 18


class _Scratch:
    """Memory kept from call to call, aligned to cache lines. Used under `_PARALLEL` only."""

    LARGEST = 1 << 24  # floats kept (64 MiB) under each name

    def __init__(self) -> None:
        self._kept: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape))
        kept = self._kept.get(name)
        if kept is None or kept.size < size:
            kept = np.empty(size + 16, np.float32)
            kept = kept[-kept.ctypes.data % 64 // 4 :][:size]  # a vector load then never straddles two cache lines
            if size <= self.LARGEST:
                self._kept[name] = kept
        return kept[:size].reshape(shape)


_panels = _Scratch()


def splice(input_ids, table, rows, plan, out, scale) -> None:
    """See `range_kernels.splice`; fills `out`."""
    source = np.empty(len(input_ids), np.int64)
    wrong = splicing.row_sources(input_ids.numpy(), plan, table.shape[0], source)
    if wrong >= 0:
        raise ValueError(
            f"input_ids[{wrong}] is {int(input_ids[wrong])}, outside the table's vocabulary of {table.shape[0]}"
        )
    bits = {2: torch.int16, 4: torch.int32}[table.element_size()]
    with _PARALLEL:
        splicing.copy_rows(source, *(x.detach().view(bits).numpy() for x in (table, rows, out)))
    if scale != 1.0:
        looked_up = torch.from_numpy(source < 0)
        out[looked_up] = out[looked_up] * scale


def attention(q, k, v, out, low, reach, lengths_q, lengths_k, scale, softcap) -> None:
    """See `range_kernels.attention`; fills `out`. 16-bit inputs are widened once, sums run in float32."""
    wide = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32)
    q, k, v = (x.detach().float().numpy() for x in (q, k, v))
    low, reach = low.numpy(), reach.numpy()
    scale, softcap = np.float32(scale), np.float32(softcap)
    if (lengths_q[1:] - lengths_q[:-1]).max() <= _DECODE_QUERIES:
        _decode(q, k, v, wide.numpy(), low, reach, lengths_q, lengths_k, scale, softcap)
    else:
        with _PARALLEL:
            _prefill(q, k, v, wide.numpy(), low, reach, lengths_q, lengths_k, scale, softcap)
    if wide is not out:
        out.copy_(wide)


def _decode(q, k, v, out, low, reach, lengths_q, lengths_k, scale, softcap) -> None:
    # [queries, 2]: first and end key of the query's sequence
    bounds = np.stack([lengths_k[:-1], lengths_k[1:]], axis=1).astype(np.int64)
    keys_of = np.repeat(bounds, lengths_q[1:] - lengths_q[:-1], axis=0)
    work = len(k) * len(q) // len(bounds) * q.shape[1] * q.shape[2]
    if work < _SMALL_WORK:
        kernels.decode_small(q, k, v, out, low, reach, keys_of, scale, softcap)
        return
    with _PARALLEL:
        kernels.decode(q, k, v, out, low, reach, keys_of, scale, softcap)


def _prefill(q, k, v, out, low, reach, lengths_q, lengths_k, scale, softcap) -> None:
    kv_heads, head_dim = k.shape[1], k.shape[2]
    panels = -(-np.diff(lengths_k) // COLUMNS)
    panel_start = np.concatenate([[0], np.cumsum(panels)]).astype(np.int32)
    keys = _panels.take("keys", (kv_heads, int(panel_start[-1]), head_dim, COLUMNS))
    values = _panels.take("values", (kv_heads, -(-head_dim // COLUMNS), k.shape[0], COLUMNS))
    kernels.pack_keys(k, lengths_k, panel_start, keys)
    kernels.pack_values(v, values)
    kernels.prefill(
        q, keys, values, out, low, reach, lengths_k, panel_start, _tasks(lengths_q, q.shape[1]), scale, softcap
    )


def _tasks(lengths_q: np.ndarray, heads: int) -> np.ndarray:
    """Blocks of queries as int32 `[n, 4]`: sequence, head, first and end query.

    Numba hands each thread one contiguous share, and late blocks of a causal prompt cost more than early ones: pairing the
    first with the last evens the shares out.
    """
    blocks = []
    for sequence in range(len(lengths_q) - 1):
        first, end = int(lengths_q[sequence]), int(lengths_q[sequence + 1])
        starts = list(range(first, end, kernels.QUERIES))
        paired = [starts[i // 2] if i % 2 == 0 else starts[-1 - i // 2] for i in range(len(starts))]
        blocks += [(sequence, start, min(start + kernels.QUERIES, end)) for start in paired]
    return np.asarray([(s, head, a, b) for s, a, b in blocks for head in range(heads)], dtype=np.int32)
