"""Call the CPU kernels on torch tensors.

Safe to call from several threads; their parallel parts run one after the other.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import threading
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from . import attention as kernels
from . import layer as layers
from . import ops, simd
from . import splice as splicing
from .kernel_cache import check_caches
from .simd import COLUMNS

check_caches(kernels, layers, ops, simd, splicing)

# GNU OpenMP's threads spin at the end of a parallel loop before they sleep, so long that two processes on the same cores (a second
# notebook) wait a time slice for each other in every loop. On two cores with two notebook panels opened at once: ready after 10 s
# with this bound, after 40 to 70 s without it when torch had one thread; a single process decodes as fast with it.
# Numba's pool reads this when it starts, at the first parallel launch; torch's own pool reads it when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Numba's portable threading layer aborts the process when two threads enter parallel code at once.
PARALLEL = threading.Lock()
# Below this many multiply-adds, or numbers touched, one thread does the work; guessed, not measured.
_SMALL_WORK = 1 << 18
_SMALL_ROWS = 1 << 14


class _Scratch:
    """Memory that is reused between calls, aligned to cache lines. Use it only while `PARALLEL` is locked."""

    LARGEST = 1 << 24  # floats kept per name (64 MiB)

    def __init__(self) -> None:
        self._kept: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.size < size:
            kept = aligned(size)
            if size <= self.LARGEST:
                self._kept[name] = kept
        return kept[:size].reshape(shape)


def aligned(size: int) -> np.ndarray:
    """Return `size` uninitialised floats that start on a cache line, so that no vector load crosses two lines."""
    memory = np.empty(size + 16, np.float32)
    return memory[-memory.ctypes.data % 64 // 4 :][:size]


class _WeightMemory:
    """Memory for packed weights, in large blocks for which the operating system is asked for huge pages.

    A decode step reads every weight once: with pages of 4 KiB most of the matrices of a small model, at 1 to 2 MiB, take a tenth
    to a fifth longer. A block lives as long as one array in it does.
    """

    BLOCK = 1 << 26  # bytes

    def __init__(self) -> None:
        self._block = np.empty(0, np.float32)
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """Return `size` uninitialised floats that start on a cache line."""
        whole = -(-size // 16) * 16
        with self._lock:
            if whole > self._block.size:
                self._block = _huge_pages(max(whole * 4, self.BLOCK))
            taken, self._block = self._block[:size], self._block[whole:]
        return taken


def _huge_pages(size: int) -> np.ndarray:
    """Private zeros of at least `size` bytes, aligned to 2 MiB, in huge pages if the operating system has them."""
    huge = 1 << 21
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return aligned(size // 4)
    memory = mmap.mmap(-1, size + huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    floats = np.frombuffer(memory, np.float32)
    return floats[-floats.ctypes.data % huge // 4 :][: size // 4]


_scratch = _Scratch()
_weight_memory = _WeightMemory()


def splice(input_ids, table, rows, plan, out, scale) -> None:
    """`range_kernels.splice` into `out` `[tokens, hidden]`; `rows` and `plan` are from `clipping.pack_rows`.

    Raises:
        ValueError: an id of a table row is outside the vocabulary.
    """
    source = np.empty(len(input_ids), np.int64)
    wrong = splicing.row_sources(input_ids.numpy(), plan, table.shape[0], source)
    if wrong >= 0:
        raise ValueError(
            f"input_ids[{wrong}] is {int(input_ids[wrong])}, outside the table's vocabulary of {table.shape[0]}"
        )
    bits = {2: torch.int16, 4: torch.int32}[table.element_size()]
    with PARALLEL:
        splicing.copy_rows(source, *(x.detach().view(bits).numpy() for x in (table, rows, out)))
    if scale != 1.0:
        looked_up = torch.from_numpy(source < 0)
        out[looked_up] = out[looked_up] * scale


def attention(q, k, v, out, key_start, key_stop, cu_seqlens_q, cu_seqlens_k, scale, softcap) -> None:
    """`range_kernels.attention` into `out`, with all arguments given.

    Keys and values are first copied into temporary pages, one sequence after the other, because the kernel reads pages
    only. 16-bit inputs are converted to float32 once; sums run in float32.
    """
    wide_k, wide_v = (x.detach().float().numpy() for x in (k, v))
    seq_lens = np.diff(cu_seqlens_k).astype(np.int32)
    page_size = kernels.KEYS if seq_lens.max() >= kernels.KEYS else COLUMNS
    pages_of = -(-seq_lens // page_size)
    first_page = np.cumsum(pages_of) - pages_of
    # The slot of each key: consecutive from its sequence's first page on.
    slots = np.arange(len(k)) + np.repeat(first_page * page_size - cu_seqlens_k[:-1], seq_lens)
    table = (first_page[:, None] + np.arange(max(int(pages_of.max()), 1))).astype(np.int32)
    with PARALLEL:
        keys, values = (
            _scratch.take(name, (int(pages_of.sum()), *shape))
            for name, shape in zip(("keys", "values"), page_shapes(page_size, *k.shape[1:]), strict=True)
        )
        _write(keys, values, slots, wide_k, wide_v)
        tasks = plan_tasks(cu_seqlens_q, seq_lens, q.shape[1] // k.shape[1], k.shape[1])
        _attend(q, keys, values, out, key_start, key_stop, seq_lens, table, tasks, scale, softcap)


def page_shapes(page_size: int, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of one page of keys and one page of values, in the layout that `cpu/attention.py` describes."""
    return (
        (kv_heads, page_size // COLUMNS, head_dim, COLUMNS),
        (kv_heads, -(-head_dim // COLUMNS), page_size, COLUMNS),
    )


def empty_pages(layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 zeros for the keys and the values, `[layers, pages, *page_shapes(...)]`.

    The operating system allocates memory only when pages are first written.
    """
    keys, values = page_shapes(page_size, kv_heads, head_dim)
    return _unwritten_zeros((layers, pages, *keys)), _unwritten_zeros((layers, pages, *values))


def _unwritten_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Float32 zeros without huge pages, which `np.zeros` asks for: the first token of each layer would allocate 2 MiB."""
    memory = mmap.mmap(-1, max(math.prod(shape), 1) * 4)
    return np.frombuffer(memory, np.float32, math.prod(shape)).reshape(shape)


# Type checkers cannot see the arguments of Numba's dispatchers.
_layers: Any = layers.decoder_layers
_write: Any = kernels.write
_write_few: Any = kernels.write_few


def write_pages(keys: np.ndarray, values: np.ndarray, slots: np.ndarray, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write `k` and `v` `[tokens, kv_heads, head_dim]` into the pages of one layer.

    `slots` int64 `[tokens]` are their locations: page number times page size, plus the offset in the page.
    """
    wide = (k.detach().float().numpy(), v.detach().float().numpy())
    if k.numel() < _SMALL_ROWS:
        _write_few(keys, values, slots, *wide)
        return
    with PARALLEL:
        _write(keys, values, slots, *wide)


def attend_pages(q, keys, values, out, key_start, key_stop, plan, scale, softcap, sinks=None) -> None:
    """Attention over the pages of one layer with a `range_kernels.PagedPlan`; fills `out`. `sinks` float32 `[q_heads]` or None."""
    rest = (plan.seq_lens, plan.block_table, plan.tasks, scale, softcap, sinks)
    if plan.max_seqlen_k * q.numel() < _SMALL_WORK:
        _attend(q, keys, values, out, key_start, key_stop, *rest, kernel=kernels.attend_small)
        return
    with PARALLEL:
        _attend(q, keys, values, out, key_start, key_stop, *rest)


_NO_SINKS = np.empty(0, np.float32)


def _attend(
    q,
    keys,
    values,
    out,
    key_start,
    key_stop,
    seq_lens,
    table,
    tasks,
    scale,
    softcap,
    sinks=None,
    kernel: Any = kernels.attend,
) -> None:
    wide = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32)
    kernel(
        q.detach().float().numpy(), keys, values, wide.numpy(), key_start.numpy(), key_stop.numpy(), seq_lens, table, tasks,
        np.float32(scale), np.float32(softcap), _NO_SINKS if sinks is None else sinks.numpy(),
    )  # fmt: skip
    if wide is not out:
        out.copy_(wide)


def plan_tasks(cu_seqlens_q: np.ndarray, seq_lens: np.ndarray, group: int, kv_heads: int) -> np.ndarray:
    """Divide a batch into tasks, int32 `[tasks, 4]`: sequence, KV head, first query and end query (exclusive).

    `group` is the number of query heads per KV head. Numba gives each thread one contiguous share of the tasks, and
    late blocks of queries of a causal prompt cost more than early ones, so tasks are sorted by cost and dealt
    round-robin to the shares.
    """
    step = max(kernels.QUERIES // group, 1)
    blocks = []
    for sequence, keys in enumerate(seq_lens.tolist()):
        first, end = int(cu_seqlens_q[sequence]), int(cu_seqlens_q[sequence + 1])
        for start in range(first, end, step):
            stop = min(start + step, end)
            blocks.append(((stop - start) * (keys - end + stop), sequence, start, stop))
    blocks.sort(reverse=True)
    tasks = [(sequence, head, start, stop) for _, sequence, start, stop in blocks for head in range(kv_heads)]
    shares = numba.get_num_threads()
    return np.asarray([task for share in range(shares) for task in tasks[share::shares]], dtype=np.int32).reshape(-1, 4)


def pack_weights(weight: torch.Tensor) -> np.ndarray:
    """Pack `weight` `[outputs, inputs]` into panels `[outputs / COLUMNS, inputs, COLUMNS]`, padded with zeros.

    The panels are float32, or bfloat16 (as uint16) if that represents every weight exactly: products have the same bits, and a decode
    step reads half as much.
    """
    outputs, inputs = weight.shape
    count, full = -(-outputs // COLUMNS), outputs // COLUMNS
    rows = weight.detach().float().contiguous()
    size = count * inputs * COLUMNS
    if _fits_bfloat16(rows):
        panels: np.ndarray = _weight_memory.take(-(-size // 2)).view(np.uint16)[:size].reshape(count, inputs, COLUMNS)
        values = (rows.view(torch.int32) >> 16).to(torch.int16).numpy().view(np.uint16)
    else:
        panels = _weight_memory.take(size).reshape(count, inputs, COLUMNS)
        values = rows.numpy()
    panels[:full] = values[: full * COLUMNS].reshape(full, COLUMNS, inputs).transpose(0, 2, 1)
    if full < count:
        panels[full] = 0
        panels[full, :, : outputs - full * COLUMNS] = values[full * COLUMNS :].T
    return panels


def _fits_bfloat16(rows: torch.Tensor) -> bool:
    """Whether bfloat16 represents all of the float32 numbers exactly."""
    bits = rows.view(torch.int32)
    return all(not (part & 0xFFFF).any() for part in bits.split(4096))  # most weights that do not fit differ at once


def linear(x: torch.Tensor, panels: np.ndarray, outputs: int) -> torch.Tensor:
    """Multiply float32 `x` `[rows, inputs]` by the weights of `pack_weights`; return `[rows, outputs]`."""
    out = torch.empty((x.shape[0], panels.shape[0] * COLUMNS))
    with PARALLEL:
        ops.linear(x.contiguous().numpy(), panels, out.numpy())
    return out if out.shape[1] == outputs else out[:, :outputs]


def pack_groups(weights: torch.Tensor) -> np.ndarray:
    """`pack_weights` of `weights` `[groups, outputs, inputs]`: `[groups, panels, inputs, COLUMNS]`."""
    groups, outputs, inputs = weights.shape
    panels = -(-outputs // COLUMNS)
    whole = torch.nn.functional.pad(weights, (0, 0, 0, panels * COLUMNS - outputs))
    return pack_weights(whole.flatten(0, 1)).reshape(groups, panels, inputs, COLUMNS)


class Groups(NamedTuple):
    """Rows in groups, as `ops.grouped_linear` needs them.

    Attributes:
        starts, counts: int64 `[groups]`.
        slots: int64 `[rows]`, where each row is; of_slot: int64 `[slots]`, the group of each slot.
    """

    starts: np.ndarray
    counts: np.ndarray
    slots: torch.Tensor
    of_slot: torch.Tensor

    @classmethod
    def of(cls, counts: np.ndarray) -> Groups:
        """Groups of `counts` rows, int64 `[groups]`; the rows are sorted by group."""
        padded = -(-counts // ops.ROWS) * ops.ROWS
        starts = np.cumsum(padded) - padded
        before = np.cumsum(counts) - counts
        slots = np.arange(counts.sum()) + np.repeat(starts - before, counts)
        return cls(starts, counts, torch.from_numpy(slots), torch.from_numpy(np.repeat(np.arange(len(counts)), padded)))


def grouped_linear(x: torch.Tensor, groups: Groups, panels: np.ndarray, outputs: int) -> torch.Tensor:
    """Multiply each group's rows of `x` `[slots, inputs]` by its weights of `pack_groups`: `[slots, outputs]`, unused slots undefined."""
    count = panels.shape[1]
    used = groups.counts.nonzero()[0]
    tasks = [
        (number % count, group, number)
        for group in used.tolist()
        for number in range(-(-int(groups.counts[group]) // ops.TOKENS) * count)
    ]
    tasks.sort()  # every thread gets a contiguous share: panels of all groups
    table = np.asarray([each[1:] for each in tasks], np.int64).reshape(-1, 2)
    out = torch.empty((len(x), count * COLUMNS))
    with PARALLEL:
        ops.grouped_linear(x.contiguous().numpy(), groups.starts, groups.counts, table, panels, out.numpy())
    return out if out.shape[1] == outputs else out[:, :outputs]


def linear_of_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, panels: np.ndarray, outputs: int
) -> torch.Tensor:
    """`linear` of `rms_norm`, in one launch if there are few rows."""
    if x.numel() >= _SMALL_ROWS:
        return linear(rms_norm(x, weight, epsilon), panels, outputs)
    out = torch.empty((x.shape[0], panels.shape[0] * COLUMNS))
    with PARALLEL:
        ops.linear_of_norm(x.numpy(), weight.numpy(), np.float32(epsilon), panels, out.numpy())
    return out if out.shape[1] == outputs else out[:, :outputs]


def linear_of_gate(both: torch.Tensor, gelu: bool, panels: np.ndarray, outputs: int) -> torch.Tensor:
    """`linear` of `gate`, in one launch if there are few rows."""
    if both.numel() >= _SMALL_ROWS:
        return linear(gate(both, gelu), panels, outputs)
    out = torch.empty((both.shape[0], panels.shape[0] * COLUMNS))
    with PARALLEL:
        ops.linear_of_gate(both.numpy(), gelu, panels, out.numpy())
    return out if out.shape[1] == outputs else out[:, :outputs]


def decoder_layers(
    total, added, weights, rotations, interleaved, rope_of, key_starts, window_of, key_stop, pages, plan, intermediate, epsilon, gelu,
    softcap, scale,
) -> bool:  # fmt: skip
    """`cpu/layer.py`'s `decoder_layers` on torch tensors; `weights`, `interleaved`, `rope_of` and `window_of` are arrays.

    Returns:
        False if the threads cannot run at the same time (a limit of OpenMP's); nothing was computed then.
    """
    tokens, hidden = total.shape
    rows = -(-tokens // ops.ROWS) * ops.ROWS
    shapes = {
        "layer qkv": (tokens, plan.q_heads + 2 * pages.kv_heads, pages.head_dim),
        "layer seen": (rows, plan.q_heads, pages.head_dim),
        "layer both": (tokens, 2 * intermediate),
        "layer product": (rows, intermediate),
        "layer normed": (rows, hidden),
    }
    state = np.zeros(layers.STATE, np.int64)
    with PARALLEL:
        scratch = [_scratch.take(name, shape) for name, shape in shapes.items()]
        _layers(
            numba.get_num_threads(), state, total.numpy(), added.numpy(), weights, np.float32(epsilon), gelu, rotations.numpy(),
            interleaved, rope_of, key_starts.numpy(), window_of, key_stop.numpy(), pages.keys, pages.values, plan.slots, plan.seq_lens,
            plan.block_table, plan.tasks, np.float32(scale), np.float32(softcap), *scratch,
        )  # fmt: skip
    return int(state[layers.STARTED]) >= 0


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm over the last dimension of a contiguous float32 `x`, times `weight` `[width]`."""
    out = torch.empty_like(x)
    args = (x.view(-1, x.shape[-1]).numpy(), weight.numpy(), np.float32(epsilon), out.view(-1, x.shape[-1]).numpy())
    _by_size(x, ops.rms_norm, ops.rms_norm_few, args)
    return out


def gate(both: torch.Tensor, gelu: bool) -> torch.Tensor:
    """`activation(both[:, :n]) * both[:, n:]` for `both` `[rows, 2 n]`."""
    out = torch.empty((both.shape[0], both.shape[1] // 2))
    _by_size(both, ops.gate, ops.gate_few, (both.contiguous().numpy(), gelu, out.numpy()))
    return out


def elementwise(x: torch.Tensor, kernel: Any) -> torch.Tensor:
    """`ops.sigmoid` or `ops.softplus` of a contiguous float32 `x`."""
    out = torch.empty_like(x)
    flat = (each.view(-1, x.shape[-1]).numpy() for each in (x, out))
    with PARALLEL:
        kernel(*flat)
    return out


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding of `x` `[tokens, heads, head_dim]`; arguments as in `range_kernels.ops.rotate`."""
    out = torch.empty(x.shape)
    _by_size(x, ops.rotate, ops.rotate_few, (x.numpy(), cosine.numpy(), sine.numpy(), interleaved, out.numpy()))
    return out


def _by_size(x: torch.Tensor, kernel, kernel_for_few, args: tuple) -> None:
    if x.numel() < _SMALL_ROWS:
        kernel_for_few(*args)
        return
    with PARALLEL:
        kernel(*args)
