"""Time the CPU kernels and their alternatives, interleaved in one run.

Run it with `python -m range_kernels.benchmarks --device cpu`. Splice is compared with Transformers' `masked_scatter`
and an index assignment; attention with torch SDPA, causal and with bidirectional spans, for which SDPA needs a dense
mask.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F

from .. import attention, splice, visible_keys
from .harness import time_interleaved

SHAPES = [(8, 1024, 128), (8, 4096, 128), (8, 2048, 64)]  # heads, tokens, head size
SPLICES = [(4096, 576), (8192, 4096)]  # tokens, hidden


def bench_attention(shape: tuple[int, int, int], rounds: int) -> list[dict]:
    """Time causal attention, and causal attention with bidirectional spans of 256 tokens over half of the prompt.

    `shape` is heads, tokens, head_dim. Returns a row per kernel: its name, the shape, median seconds and GFLOP/s.
    """
    heads, tokens, head_dim = shape
    q, k, v = (torch.randn(tokens, heads, head_dim) for _ in range(3))
    batch_q, batch_k, batch_v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    spans = [(start, start + 256) for start in range(0, tokens, 512)]
    key_start, key_stop = (torch.from_numpy(x) for x in visible_keys(tokens, spans))
    dense = torch.arange(tokens) < key_stop[:, None]
    lengths = [0, tokens]
    seconds = time_interleaved(
        {
            "range_kernels causal": lambda: attention(q, k, v, lengths, lengths),
            "SDPA causal": lambda: F.scaled_dot_product_attention(batch_q, batch_k, batch_v, is_causal=True),
            "range_kernels spans": lambda: attention(q, k, v, lengths, lengths, key_start=key_start, key_stop=key_stop),
            "SDPA spans, dense mask": lambda: F.scaled_dot_product_attention(
                batch_q, batch_k, batch_v, attn_mask=dense
            ),
        },
        rounds,
    )
    pairs = {"causal": tokens * (tokens + 1) // 2, "spans": int(key_stop.sum())}
    work = {name: 4 * heads * head_dim * pairs["spans" if "spans" in name else "causal"] for name in seconds}
    return [
        {"kernel": name, "shape": list(shape), "seconds": value, "gflops": work[name] / value / 1e9}
        for name, value in seconds.items()
    ]


def bench_splice(shape: tuple[int, int], rounds: int) -> list[dict]:
    """Time splice with half of the tokens in ranges of 256; `shape` is tokens, hidden.

    Returns a row per method: its name, the shape, median seconds and GB/s, counting one read and one write of each row.
    """
    tokens, hidden = shape
    table = torch.randn(32000, hidden)
    ids = torch.randint(32000, (tokens,))
    ranges = [(start, start + 256) for start in range(0, tokens, 512)]
    items = [torch.randn(256, hidden) for _ in ranges]
    inside = torch.zeros(tokens, dtype=torch.bool)
    for start, stop in ranges:
        inside[start:stop] = True
    positions = inside.nonzero().flatten()

    def scatter() -> torch.Tensor:
        return table[ids].masked_scatter(inside[:, None].expand(-1, hidden), torch.cat(items))

    def index() -> torch.Tensor:
        state = table[ids]
        state[positions] = torch.cat(items)
        return state

    jobs = {
        "range_kernels splice": lambda: splice(ids, table, items, ranges),
        "masked_scatter": scatter,
        "index assignment": index,
    }
    moved = 2 * tokens * hidden * table.element_size()
    return [
        {"kernel": name, "shape": list(shape), "seconds": value, "gbytes": moved / value / 1e9}
        for name, value in time_interleaved(jobs, rounds).items()
    ]


def run(rounds: int) -> dict[str, Any]:
    """Run all benchmarks, print each result as it is measured, and return the report."""
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, float32; medians of {rounds}")
    rows: list[dict] = []

    def show(found: list[dict]) -> None:
        for row in found:
            rate = f"{row['gflops']:9.0f} GFLOP/s" if "gflops" in row else f"{row['gbytes']:9.1f} GB/s"
            print(f"  {row['kernel']:24} {tuple(row['shape'])!s:18} {row['seconds'] * 1000:9.2f} ms {rate}")
        rows.extend(found)

    for shape in SHAPES:
        show(bench_attention(shape, rounds))
    for pair in SPLICES:
        show(bench_splice(pair, rounds))
    return {"torch": torch.__version__, "device": name, "results": rows}
