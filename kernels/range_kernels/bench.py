"""`python -m range_kernels.bench`: the kernels beside what a user would pick instead, in one run, in turns.

On the CPU: splice against Transformers' `masked_scatter` and an index assignment; attention against torch SDPA, causal and
with bidirectional spans (which SDPA needs a dense mask for). On a GPU, if there is one, the same with CUDA tensors.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from . import attention, splice, visible_keys

SHAPES = {"cpu": [(8, 1024, 128), (8, 4096, 128), (8, 2048, 64)], "cuda": [(32, 1024, 128), (32, 4096, 64)]}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
SPLICES = {"cpu": [(4096, 576), (8192, 4096)], "cuda": [(8192, 4096), (65536, 4096)]}


def time_in_turns(jobs: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each job, all of them run once a round; the first two rounds only warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 2):
        for name, job in jobs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            job()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def bench_attention(device: str, shape: tuple[int, int, int], rounds: int) -> list[dict]:
    """Causal, and causal plus bidirectional spans of 256 tokens over half of the prompt; shape: heads, tokens, head_dim."""
    heads, tokens, head_dim = shape
    q, k, v = (torch.randn(tokens, heads, head_dim, device=device).to(DTYPES[device]) for _ in range(3))
    batch_q, batch_k, batch_v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    spans = [(start, start + 256) for start in range(0, tokens, 512)]
    low, reach = (torch.from_numpy(x).to(device) for x in visible_keys(tokens, spans))
    dense = torch.arange(tokens, device=device) <= reach[:, None]
    lengths = [0, tokens]
    seconds = time_in_turns(
        {
            "range_kernels causal": lambda: attention(q, k, v, lengths, lengths),
            "SDPA causal": lambda: F.scaled_dot_product_attention(batch_q, batch_k, batch_v, is_causal=True),
            "range_kernels spans": lambda: attention(q, k, v, lengths, lengths, low=low, reach=reach),
            "SDPA spans, dense mask": lambda: F.scaled_dot_product_attention(
                batch_q, batch_k, batch_v, attn_mask=dense
            ),
        },
        rounds,
        device,
    )
    pairs = {"causal": tokens * (tokens + 1) // 2, "spans": int((reach + 1).sum())}
    work = {name: 4 * heads * head_dim * pairs["spans" if "spans" in name else "causal"] for name in seconds}
    return [
        {"kernel": name, "shape": list(shape), "seconds": value, "gflops": work[name] / value / 1e9}
        for name, value in seconds.items()
    ]


def bench_splice(device: str, shape: tuple[int, int], rounds: int) -> list[dict]:
    """Half of the tokens in ranges of 256; bytes count one read and one write a row; shape: tokens, hidden."""
    tokens, hidden = shape
    table = torch.randn(32000, hidden, device=device).to(DTYPES[device])
    ids = torch.randint(32000, (tokens,), device=device)
    ranges = [(start, start + 256) for start in range(0, tokens, 512)]
    items = [torch.randn(256, hidden, device=device).to(table.dtype) for _ in ranges]
    inside = torch.zeros(tokens, dtype=torch.bool, device=device)
    for start, stop in ranges:
        inside[start:stop] = True
    places = inside.nonzero().flatten()

    def scatter() -> torch.Tensor:
        return table[ids].masked_scatter(inside[:, None].expand(-1, hidden), torch.cat(items))

    def index() -> torch.Tensor:
        state = table[ids]
        state[places] = torch.cat(items)
        return state

    jobs = {
        "range_kernels splice": lambda: splice(ids, table, items, ranges),
        "masked_scatter": scatter,
        "index assignment": index,
    }
    moved = 2 * tokens * hidden * table.element_size()
    return [
        {"kernel": name, "shape": list(shape), "seconds": value, "gbytes": moved / value / 1e9}
        for name, value in time_in_turns(jobs, rounds, device).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m range_kernels.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "results": [],
    }
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        print(f"{device}: {name}, torch {torch.__version__}, {str(DTYPES[device]).removeprefix('torch.')}")
        rows = [row for shape in SHAPES[device] for row in bench_attention(device, shape, options.rounds)]
        rows += [row for shape in SPLICES[device] for row in bench_splice(device, shape, options.rounds)]
        for row in rows:
            rate = f"{row['gflops']:9.0f} GFLOP/s" if "gflops" in row else f"{row['gbytes']:9.1f} GB/s"
            print(f"  {row['kernel']:24} {tuple(row['shape'])!s:18} {row['seconds'] * 1000:9.2f} ms {rate}")
            report["results"].append({"device": name, **row})
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
