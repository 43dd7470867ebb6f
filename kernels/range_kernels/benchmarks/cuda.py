"""Time the CUDA kernels and their alternatives, interleaved in one run (`python -m range_kernels.benchmarks`).

Prefill: torch SDPA's FlashAttention-2 and cuDNN kernels (causal), cuDNN with a dense mask and FlexAttention (spans). Paged decode:
torch SDPA's kernels on a dense cache, and a plain copy that moves as many bytes. Splice: a fused Triton kernel, an index
assignment, `index_copy_`, Transformers' masked_scatter, and a plain copy. Times are medians of GPU events; a job's
inputs are not in the L2 cache when it begins.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import KVPages, PagedPlan, SplicePlan, attention, paged_attention, splice, visible_keys
from ..cuda.compiled_kernel import loaded
from .triton_splice import triton_jobs

HEADS, KV_HEADS, SPAN = 32, 8, 256
PREFILLS = (
    (4, 4096, 128),
    (1, 16384, 128),
    (4, 4096, 64),
    (4, 4096, 80),
    (4, 4096, 96),
    (2, 4096, 256),
)  # batch, tokens, head size
DECODES = ((1, 4096), (64, 4096), (16, 32768))  # batch, keys; head size 128
PAGE_SIZE = 64
SPLICES = ((512, 4096), (8192, 4096), (65536, 4096), (65536, 8192))  # tokens, hidden
_COPIES = 3  # copies of every input, which successive rounds use cyclically
_BUSY_CYCLES = 3_000_000  # cycles, about 2 ms
_EVICTION_BYTES = 256 << 20  # bytes read to evict the L2 cache, several times its size


def time_interleaved(jobs: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Return the median GPU milliseconds of each job; a job is called with the number of the input copy to use.

    The GPU is kept busy before each job, so that its work is timed and not the host's launch overhead, and the L2 cache
    is filled with other data, as it is between the layers of a model.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    eviction_buffer = torch.zeros(_EVICTION_BYTES // 4, device="cuda")
    for copy in range(rounds + 3):
        for name, job in jobs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            eviction_buffer.sum()  # read, not written: the job would pay for writing dirty lines back
            torch.cuda._sleep(_BUSY_CYCLES)
            start.record()
            job(copy % _COPIES)
            stop.record()
            stop.synchronize()
            if copy >= 3:
                times[name].append(start.elapsed_time(stop))
    return {name: median(values) for name, values in times.items()}


def host_microseconds(job: Callable[[int], object], calls: int = 200) -> float:
    """Return the host's microseconds per call, not waiting for the GPU: the median of three means of `calls` calls."""
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for copy in range(calls):
            job(copy % _COPIES)
        times.append((time.perf_counter() - started) / calls * 1e6)
    return median(times)


def bench_host() -> dict[str, float]:
    """Return the host microseconds per call of each kernel on small inputs."""
    table = torch.randn(1000, 4096, device="cuda").bfloat16()
    ids, items = torch.randint(1000, (512,), device="cuda"), [torch.randn(256, 4096, device="cuda").bfloat16()]
    q = torch.randn(512, HEADS, 128, device="cuda").bfloat16()
    k = q[:, :KV_HEADS]
    key_start, key_stop = (torch.from_numpy(each).cuda() for each in visible_keys(512))
    jobs: dict[str, Callable[[int], object]] = {
        "splice": lambda copy: splice(ids, table, items, [(0, 256)]),
        "attention": lambda copy: attention(q, k, k, [0, 512], [0, 512], key_start=key_start, key_stop=key_stop),
    }
    return {name: host_microseconds(job) for name, job in jobs.items()}


def bench_prefill(shape: tuple[int, int, int], rounds: int, flex: bool) -> dict[str, float]:
    """Return the median milliseconds of each kernel in bfloat16, causal and with adjacent spans of 256 tokens.

    `shape` is batch, tokens per sequence, head_dim; `flex` includes FlexAttention.
    """
    batch, tokens, head_dim = shape
    packed = [
        [
            torch.randn(batch * tokens, heads, head_dim, device="cuda").bfloat16()
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]
        for _ in range(_COPIES)
    ]
    lengths = [number * tokens for number in range(batch + 1)]
    spans = [(start, start + SPAN) for start in range(0, tokens, SPAN)]
    bounds = {}
    for name, ranges in (("causal", []), ("spans", spans)):
        key_start, key_stop = visible_keys(tokens, ranges)
        bounds[name] = tuple(torch.from_numpy(each).cuda().repeat(batch) for each in (key_start, key_stop))

    def ours(name: str, path: str) -> Callable[[int], object]:
        key_start, key_stop = bounds[name]

        def run(copy: int) -> object:
            q, k, v = packed[copy]
            return attention(q, k, v, lengths, lengths, key_start=key_start, key_stop=key_stop, path=path)

        return run

    def batched(copy: int) -> list[torch.Tensor]:
        return [x.view(batch, tokens, -1, head_dim).transpose(1, 2) for x in packed[copy]]

    def sdpa(backend: SDPBackend, mask: torch.Tensor | None = None) -> Callable[[int], object]:
        def run(copy: int) -> object:
            q, k, v = batched(copy)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

        return run

    dense = torch.arange(tokens, device="cuda") < bounds["spans"][1][:tokens, None]
    pages, table = _paged(packed, batch, tokens, head_dim)
    plan = PagedPlan(table, lengths, [tokens] * batch, pages, HEADS)

    def ours_paged(copy: int) -> object:
        key_start, key_stop = bounds["spans"]
        return paged_attention(packed[copy][0], pages, copy, plan, key_start=key_start, key_stop=key_stop)

    paths = ["hopper", "tensor-core"] if torch.cuda.get_device_capability()[0] == 9 else ["tensor-core"]
    jobs = {f"{path}, {name}": ours(name, path) for path in paths for name in ("causal", "spans")}
    jobs[f"{paths[0]}, spans, paged"] = ours_paged
    others: dict[str, Callable[[int], object]] = {
        "flash, causal": sdpa(SDPBackend.FLASH_ATTENTION),
        "cuDNN, causal": sdpa(SDPBackend.CUDNN_ATTENTION),
        "cuDNN, spans (dense mask)": sdpa(SDPBackend.CUDNN_ATTENTION, dense[None, None]),
    }
    if flex:
        others |= _flex_jobs(batched, tokens)
    return time_interleaved(jobs | _runnable(others), rounds)


def _paged(
    packed: list[list[torch.Tensor]], batch: int, tokens: int, head_dim: int
) -> tuple[KVPages, np.ndarray[Any, Any]]:
    """Return the keys and values of every copy in pages in random order, one layer per copy, and the block table."""
    count = batch * tokens // PAGE_SIZE
    pages = KVPages(len(packed), count, PAGE_SIZE, KV_HEADS, head_dim, torch.bfloat16, "cuda")
    order = np.random.default_rng(0).permutation(count)
    for number, (_, k, v) in enumerate(packed):
        for x, into in ((k, pages.keys), (v, pages.values)):
            into[number, torch.from_numpy(order).cuda()] = x.view(count, PAGE_SIZE, KV_HEADS, head_dim)
    return pages, order.reshape(batch, -1)


def _flex_jobs(batched: Callable[[int], list[torch.Tensor]], tokens: int) -> dict[str, Callable[[int], object]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    def spans(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) | (q // SPAN == k // SPAN)

    masks = {f.__name__: create_block_mask(f, None, None, tokens, tokens, device="cuda") for f in (causal, spans)}

    def run(name: str) -> Callable[[int], object]:
        return lambda copy: compiled(*batched(copy), block_mask=masks[name], enable_gqa=True)

    return {f"FlexAttention, {name}": run(name) for name in masks}


def _runnable(jobs: Mapping[str, Callable[[int], object]]) -> dict[str, Callable[[int], object]]:
    """Return the jobs of other libraries that run on this GPU and head size; print the name of each job that is left out."""
    running = {}
    for name, job in jobs.items():
        try:
            job(0)
            running[name] = job
        except Exception as error:  # torch, Triton and Inductor raise many kinds
            message = (str(error).splitlines() or [""])[0]
            print(f"{name}: left out, {type(error).__name__}: {message[:120]}")
    return running


def bench_decode(shape: tuple[int, int], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of a decode step's attention in bfloat16, including writing its new keys.

    `shape` is batch, keys per sequence; pages have 64 tokens and are in random order.
    """
    batch, keys = shape
    per_sequence = keys // PAGE_SIZE
    pages = KVPages(_COPIES, batch * per_sequence, PAGE_SIZE, KV_HEADS, 128, torch.bfloat16, "cuda")
    pages.keys.normal_()
    pages.values.normal_()
    table = np.random.default_rng(0).permutation(batch * per_sequence).reshape(batch, per_sequence)
    plan = PagedPlan(table, range(batch + 1), [keys] * batch, pages, HEADS)
    key_start = torch.zeros(batch, dtype=torch.int32, device="cuda")
    key_stop = torch.full_like(key_start, keys)
    q, new = (torch.randn(batch, heads, 128, device="cuda").bfloat16() for heads in (HEADS, KV_HEADS))

    def dense(x: torch.Tensor) -> torch.Tensor:
        return x.view(batch, keys, KV_HEADS, 128).transpose(1, 2)

    def sdpa(backend: SDPBackend) -> Callable[[int], object]:
        def run(copy: int) -> object:
            with sdpa_kernel(backend):
                k, v = dense(pages.keys[copy]), dense(pages.values[copy])
                return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

        return run

    def ours(copy: int) -> torch.Tensor:
        return paged_attention(q, pages, copy, plan, new=(new, new), key_start=key_start, key_stop=key_stop)

    half = torch.empty_like(pages.keys[0])  # reading one and writing one moves as many bytes as reading keys and values
    others = {
        "flash, dense cache": sdpa(SDPBackend.FLASH_ATTENTION),
        "cuDNN, dense cache": sdpa(SDPBackend.CUDNN_ATTENTION),
        "copy": lambda copy: half.copy_(pages.keys[copy]),
    }
    return time_interleaved({"ours, paged": ours} | _runnable(others), rounds)


def bench_splice(shape: tuple[int, int], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each method in bfloat16, with half of the tokens in ranges.

    `shape` is tokens, hidden; the vocabulary has 128,256 ids; a range has 576 tokens, or half of all tokens if that is
    fewer.
    """
    tokens, hidden = shape
    table = torch.randn(128256, hidden, device="cuda", dtype=torch.bfloat16)
    size = min(576, tokens // 2)
    ranges = [(start, start + size) for start in range(0, tokens - size + 1, 2 * size)]
    ids = [torch.randint(128256, (tokens,), device="cuda") for _ in range(_COPIES)]
    items = [torch.randn(size, hidden, device="cuda", dtype=torch.bfloat16) for _ in ranges]
    concatenated = torch.cat(items)
    positions = torch.cat([torch.arange(start, stop, device="cuda") for start, stop in ranges])
    inside = torch.zeros(tokens, 1, dtype=torch.bool, device="cuda")
    inside[positions] = True
    source, target = (torch.empty(tokens, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    plan = SplicePlan(items, ranges, table, tokens)
    captured = [torch.cuda.CUDAGraph() for _ in range(_COPIES)]
    for graph, each in zip(captured, ids, strict=True):
        splice(each, table, plan=plan)
        with torch.cuda.graph(graph):
            splice(each, table, plan=plan)

    def index_assignment(copy: int) -> torch.Tensor:
        state = table[ids[copy]]
        state[positions] = concatenated
        return state

    return time_interleaved(
        {
            "ours": lambda copy: splice(ids[copy], table, items, ranges),
            "ours, graph": lambda copy: captured[copy].replay(),
            **triton_jobs(ids, table, concatenated, positions, target),
            "masked_scatter": lambda copy: table[ids[copy]].masked_scatter(inside.expand(-1, hidden), concatenated),
            "index_copy": lambda copy: table[ids[copy]].index_copy_(0, positions, concatenated),
            "index assignment": index_assignment,
            "copy": lambda copy: target.copy_(source),
        },
        rounds,
    )


def clocks() -> str:
    """Return the clocks and power that the driver reports now; empty if it reports none."""
    command = [
        "nvidia-smi",
        "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def run(rounds: int, flex: bool = True) -> dict[str, Any]:
    """Run all benchmarks, print each result as it is measured, and return the report."""
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "numba": numba.__version__, "rounds": rounds, "prefill": [], "decode": [], "splice": [],
    }  # fmt: skip
    print(f"{report['device']}, torch {torch.__version__}, numba {numba.__version__}; medians of {rounds}")
    for shape in PREFILLS:
        batch, tokens, head_dim = shape
        work = 4 * batch * HEADS * head_dim * (tokens * (tokens + 1) // 2)  # counted as causal, spans too
        for name, ms in bench_prefill(shape, rounds, flex).items():
            print(f"prefill {batch} x {tokens}, head {head_dim}: {name:26} {ms:8.3f} ms {work / ms / 1e9:6.0f} TFLOP/s")
            report["prefill"].append({"shape": shape, "kernel": name, "ms": ms, "tflops": work / ms / 1e9})
    report["clocks"] = clocks()
    for batch, keys in DECODES:
        moved = 4 * batch * keys * KV_HEADS * 128
        for name, ms in bench_decode((batch, keys), rounds).items():
            print(f"decode {batch} x {keys}: {name:18} {ms:8.3f} ms {moved / ms / 1e9:6.2f} TB/s")
            report["decode"].append({"shape": (batch, keys), "kernel": name, "ms": ms, "tbytes": moved / ms / 1e9})
    for tokens, hidden in SPLICES:
        moved = 2 * tokens * hidden * 2
        for name, ms in bench_splice((tokens, hidden), rounds).items():
            print(f"splice {tokens} x {hidden}: {name:17} {ms:8.3f} ms {moved / ms / 1e9:6.2f} TB/s")
            report["splice"].append({"shape": (tokens, hidden), "kernel": name, "ms": ms, "tbytes": moved / ms / 1e9})
    report["host_us"] = bench_host()
    for name, microseconds in report["host_us"].items():
        print(f"host, {name}: {microseconds:.0f} us per call")
    report["first_calls"] = [
        {"kernel": each.source.name, "seconds": each.seconds, "from_disk": each.cached} for each in loaded
    ]
    for from_disk, words in ((False, "compiled and cached"), (True, "read from disk")):
        seconds = [each.seconds for each in loaded if each.cached is from_disk]
        if seconds:
            print(f"first call, {words}: {len(seconds)} kernels, {median(seconds):.2g} s each (median)")
    print(f"clocks and power after the prefills: {report['clocks'] or 'not reported'}")
    return report
