"""Random attention calls on a GPU and the same in plain torch with a dense mask, for GPU tests and the fuzz test."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from range_kernels import visible_keys
from range_kernels.cuda import prefill_sm90

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
PATHS = ["tensor-core", "hopper"]


def random_call(generator, head_dim, dtype, decoding=False):
    """Packed sequences of random lengths, some chunked, with spans and windows; q, k, v and bounds on the GPU.

    `decoding`: most sequences have a few queries at the end of many keys.
    """
    kv_heads = int(generator.integers(1, 4))
    heads = kv_heads * int(generator.integers(1, 4))
    queries, keys, key_starts, key_stops = [], [], [], []
    for _ in range(int(generator.integers(1, 4))):
        length = int(generator.choice([1, 17, 63, 64, 65, 127, 128, 129, 200, 257, 400]))
        first = int(generator.integers(0, length)) if generator.random() < 0.3 else 0
        if decoding and generator.random() < 0.8:
            length = int(generator.choice([1, 2, 63, 64, 65, 300, 1000, 4097, 9000]))
            first = max(length - int(generator.integers(1, 4)), 0)
        edges = sorted({int(edge) for edge in generator.integers(0, length + 1, 6)})
        spans = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False) if not a < first < b]
        window = int(generator.integers(1, 100)) if generator.random() < 0.3 else None
        rule = str(generator.choice(["inside", "union"]))
        key_start, key_stop = visible_keys(length, spans, first=first, window=window, window_rule=rule)
        queries.append(length - first)
        keys.append(length)
        key_starts.append(key_start)
        key_stops.append(key_stop)
    total_q, total_k = sum(queries), sum(keys)
    make = torch.Generator("cuda").manual_seed(int(generator.integers(2**31)))
    q, k, v = (
        torch.randn(total, count, head_dim, generator=make, device="cuda").to(dtype)
        for total, count in ((total_q, heads), (total_k, kv_heads), (total_k, kv_heads))
    )
    bounds = [torch.from_numpy(np.concatenate(each)).cuda() for each in (key_starts, key_stops)]
    return q, k, v, [0, *accumulate(queries)], [0, *accumulate(keys)], *bounds


def dense(q, k, v, cu_q, cu_k, key_start, key_stop, softcap, dtype):
    """Attention with a dense mask and plain torch operations in `dtype`, one sequence at a time."""
    outs = []
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        group = q.shape[1] // k.shape[1]
        x, y, z = (t.to(dtype).transpose(0, 1) for t in (q[a:b], k[c:d], v[c:d]))
        y, z = (t.repeat_interleave(group, dim=0) for t in (y, z))
        place = torch.arange(d - c, device=q.device)
        seen = (place >= key_start[a:b, None]) & (place < key_stop[a:b, None])
        if softcap:
            scores = torch.tanh(x @ y.transpose(1, 2) * q.shape[2] ** -0.5 / softcap) * softcap
            weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
            outs.append((weights @ z).transpose(0, 1))
        else:
            outs.append(torch.nn.functional.scaled_dot_product_attention(x, y, z, attn_mask=seen).transpose(0, 1))
    return torch.cat(outs)


def assert_error_at_most_twice_torch(out, case, softcap=0.0):
    """The output is finite and its error against float64 is at most twice that of torch's attention in the same dtype.

    In float32 an error of a few roundoffs also passes, because torch's own error can be almost zero.
    """
    expected = dense(*case, softcap, torch.float64)
    theirs = (dense(*case, softcap, out.dtype).double() - expected).norm()
    mine = (out.double() - expected).norm()
    limit = 2 * theirs + (1e-12 if out.dtype is not torch.float32 else 4e-6 * expected.norm())
    assert torch.isfinite(out).all(), "not finite"
    assert mine <= limit, f"error {mine}, torch's error {theirs}"


def skip_unless_supported(path, head_dim):
    """Skip the test if this GPU does not have the path or the path does not support the head size."""
    if path == "hopper" and (torch.cuda.get_device_capability()[0] != 9 or head_dim not in prefill_sm90.HEAD_DIMS):
        pytest.skip("no hopper path on this GPU or for this head size")
