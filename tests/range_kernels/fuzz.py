"""Fuzz test of packed and paged attention on a GPU: random calls on every supported path, compared with float64.

    python -m tests.range_kernels.fuzz --cases 10000

A call passes if its error is at most twice that of torch's attention in the same dtype (in float32: a few roundoffs).
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from range_kernels import attention
from range_kernels.cuda import prefill_sm90
from range_kernels.kv_cache import PAGE_SIZES

from tests.range_kernels.gpu_calls import assert_error_at_most_twice_torch, random_call
from tests.range_kernels.paging import last_keys, put_in_pages, run_paged

HEAD_DIMS = (64, 80, 96, 128, 256, 8, 72, 192)


def one(generator: np.random.Generator, head_dims: Sequence[int]) -> str:
    """Run one random call. Returns a label of the case; raises AssertionError if the error is too large."""
    dtype = [torch.bfloat16, torch.float16, torch.float32][int(generator.choice(3, p=[0.45, 0.45, 0.1]))]
    head_dim = int(generator.choice(head_dims))
    softcap = 20.0 if generator.random() < 0.25 else 0.0
    paged = bool(generator.random() < 0.5)
    case = random_call(generator, head_dim, dtype, decoding=paged)
    q, k, v, cu_q, cu_k, key_start, key_stop = case
    torch.empty_like(q).fill_(torch.nan)  # freed immediately: the output probably reuses this memory
    # Pretend that the GPU has fewer multiprocessors, so that a persistent block processes many work tiles.
    blocks = int(generator.choice([1, 3, 20, 132]))
    prefill_sm90.multiprocessors = lambda device: blocks
    if paged:
        page_size = int(generator.choice(PAGE_SIZES))
        new = None
        if generator.random() < 0.5:  # the call writes the new keys and values itself; before, their slots contain NaN
            last = torch.from_numpy(last_keys(cu_q, cu_k)).cuda()
            new = k[last], v[last]
            k, v = k.clone(), v.clone()
            k[last] = v[last] = torch.nan
        pages, table = put_in_pages(generator, k, v, cu_k, page_size)
        out = run_paged(pages, table, q, cu_q, cu_k, key_start, key_stop, new=new, softcap=softcap)
    else:
        # Without `path` the fastest path is chosen; half of the supported cases request the portable path instead.
        portable = dtype is not torch.float32 and head_dim in HEAD_DIMS[:5] and generator.random() < 0.5
        path = "tensor-core" if portable else None
        out = attention(q, k, v, cu_q, cu_k, key_start=key_start, key_stop=key_stop, softcap=softcap, path=path)
    what = f"{'paged' if paged else 'packed'} {dtype} {head_dim}"
    try:
        assert_error_at_most_twice_torch(out, case, softcap)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}; {cu_q}, {cu_k}, softcap {softcap}") from None
    return what


def many(arguments: tuple[int, int, Sequence[int], float | None]) -> Counter[str]:
    """Run cases with the given head sizes and count them by label; RuntimeError reports the first failing case."""
    cases, seed, head_dims, seconds = arguments
    began, done = time.monotonic(), Counter[str]()
    for number in range(cases):
        try:
            done[one(np.random.default_rng((seed, head_dims[0], number)), head_dims)] += 1
        except AssertionError as error:
            raise RuntimeError(f"case {number} of seed {seed}, head sizes {head_dims}: {error}") from error
        if seconds is not None and time.monotonic() - began > seconds:
            break
    return done


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop after this many seconds")
    parser.add_argument(
        "--workers", type=int, default=len(HEAD_DIMS), help="processes; each compiles the kernels of its head sizes"
    )
    options = parser.parse_args()
    began = time.monotonic()
    workers = min(options.workers, len(HEAD_DIMS))
    shares = [HEAD_DIMS[at::workers] for at in range(workers)]
    jobs = [(-(-options.cases // workers), options.seed, share, options.seconds) for share in shares]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        done = sum(pool.map(many, jobs), Counter())
    print(f"{sum(done.values())} cases in {time.monotonic() - began:.0f} s, none wrong: {dict(sorted(done.items()))}")


if __name__ == "__main__":
    main()
