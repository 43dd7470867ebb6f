"""One layer's experts compared with Transformers' own, interleaved: `python -m workbench.benchmarks experts --device cuda`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from range_kernels.experts import Experts

from ..models.options import parse_dtype
from ..trace.provenance import versions

SHAPES = {"Qwen3-30B-A3B": (128, 8, 2048, 768), "Mixtral 8x7B, a quarter as wide": (8, 2, 2048, 3584)}
"""Experts, chosen ones, hidden, intermediate."""
ROWS = (1, 16, 64, 1024)
THEIRS = ("grouped_mm", "batched_mm", "eager")
_EVICTED = 256 << 20  # bytes read between jobs on a GPU, so that weights are not in its cache
_MOST_GATHERED = 4 << 30  # bytes; "batched_mm" copies the weights of every row's experts


def run(dtype: str, device: str, rounds: int, file: Path | None = None) -> dict[str, Any]:
    """Time the experts of `SHAPES` on `ROWS` rows; print a table, write it as JSON to `file` if given, and return it.

    Times are medians of `rounds`; on a GPU of whole calls from Python and, where it can be captured, of the replay of a CUDA graph.
    """
    kind = parse_dtype(dtype, ("float32", "bfloat16"), "numba")
    report: dict[str, Any] = {"dtype": dtype, "device": device, "rounds": rounds, "versions": versions(), "results": []}
    if device == "cuda":
        report["gpu"] = torch.cuda.get_device_name()
    for name, shape in SHAPES.items():
        modules, ours = _experts(shape, kind, device)
        for rows in ROWS:
            jobs = _jobs(modules, ours, shape, rows, kind, device)
            seconds = _interleaved(jobs, rounds, device)
            if device == "cuda":
                captured = {each: _captured(job) for each, job in jobs.items() if each not in ("eager", "batched_mm")}
                replays = _interleaved(captured, rounds, device)
                seconds |= {f"{each}, captured": value for each, value in replays.items()}
            report["results"].append(
                {"shape": name, "rows": rows, "milliseconds": {k: 1e3 * v for k, v in seconds.items()}}
            )
            print(
                f"{name:32} {rows:5} rows  " + "  ".join(f"{k} {1e3 * v:.3f} ms" for k, v in seconds.items()),
                flush=True,
            )
        del modules, ours
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _experts(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> tuple[dict[str, Any], Experts]:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    count, chosen, hidden, intermediate = shape
    generator = torch.Generator(device).manual_seed(0)
    # As in published checkpoints, bfloat16 represents the weights exactly.
    gate_up = (
        torch.randn(count, 2 * intermediate, hidden, generator=generator, device=device).mul_(0.02).bfloat16().to(dtype)
    )
    down = torch.randn(count, hidden, intermediate, generator=generator, device=device).mul_(0.02).bfloat16().to(dtype)
    modules = {}
    for implementation in THEIRS:
        config = Qwen3MoeConfig(
            num_experts=count, num_experts_per_tok=chosen, hidden_size=hidden, moe_intermediate_size=intermediate
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(down, requires_grad=False)
        modules[implementation] = module.eval()
    return modules, Experts(gate_up, down)


def _jobs(
    modules: Mapping[str, Any],
    ours: Experts,
    shape: tuple[int, int, int, int],
    rows: int,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Callable[[], torch.Tensor]]:
    count, chosen, hidden, intermediate = shape
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(rows, hidden, generator=generator, device=device).to(dtype)
    scores = torch.rand(rows, count, generator=generator, device=device)
    which = scores.topk(chosen, dim=1).indices.sort(dim=1).values
    weights = torch.full((rows, chosen), 1 / chosen, device=device)
    jobs: dict[str, Callable[[], torch.Tensor]] = {"ours": lambda: ours(x, which, weights)}
    for name, module in modules.items():
        if name == "batched_mm" and rows * chosen * 3 * hidden * intermediate * dtype.itemsize > _MOST_GATHERED:
            continue
        jobs[name] = lambda module=module: module(x, which, weights.to(dtype))  # type: ignore[misc]
    expected = jobs["eager"]().float()
    with torch.no_grad():
        for name, job in jobs.items():
            error = float((job().float() - expected).norm() / expected.norm())
            assert error < (1e-5 if dtype is torch.float32 else 2e-2), f"{name} differs by {error}"
    return jobs


@torch.no_grad()
def _captured(job: Callable[[], torch.Tensor]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        job()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph.replay


@torch.no_grad()
def _interleaved(jobs: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each job."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    others = torch.zeros(_EVICTED // 4, device=device) if device == "cuda" else None
    for number in range(rounds + 2):
        for name, job in jobs.items():
            if others is not None:
                others.sum()
                torch.cuda.synchronize()
            start = time.perf_counter()
            job()
            if others is not None:
                torch.cuda.synchronize()
            if number >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}
