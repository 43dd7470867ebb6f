"""Features that only the Hopper prefill has; needs a GPU: `make test-gpu`."""

from itertools import accumulate

import numpy as np
import pytest
import torch
from range_kernels import attention, visible_keys
from range_kernels.cuda import prefill_sm90
from range_kernels.kv_cache import PAGE_SIZES

from tests.range_kernels.gpu_calls import NEEDS_GPU, skip_unless_supported
from tests.range_kernels.paging import put_in_pages, run_paged

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("blocks", [1, 3, 132])
@pytest.mark.parametrize("head_dim", prefill_sm90.HEAD_DIMS)
def test_hopper_persistent_blocks_match_the_tensor_core_path(head_dim, blocks, monkeypatch):
    """Long and short sequences, spans, windows, and queries without visible keys, in hundreds of work tiles."""
    skip_unless_supported("hopper", head_dim)
    monkeypatch.setattr(prefill_sm90, "multiprocessors", lambda device: blocks)
    generator = np.random.default_rng(blocks)
    lengths = [1, 900, 130, 2000, 64, 1, 1777, 128]
    cu = [0, *accumulate(lengths)]
    bounds = []
    for length in lengths:
        edges = sorted({int(edge) for edge in generator.integers(0, length + 1, 8)})
        window = 300 if length == 2000 else None
        key_start, key_stop = visible_keys(length, list(zip(edges[::2], edges[1::2], strict=False)), window=window)
        key_stop[length // 3 : length // 2] = 0
        bounds.append((key_start, key_stop))
    key_start, key_stop = (torch.from_numpy(np.concatenate(each)).cuda() for each in zip(*bounds, strict=True))
    q, k, v = (torch.randn(cu[-1], heads, head_dim, device="cuda").bfloat16() for heads in (12, 4, 4))
    wanted = attention(q, k, v, cu, cu, key_start=key_start, key_stop=key_stop, path="tensor-core")
    pages, table = put_in_pages(generator, k, v, cu, int(generator.choice(PAGE_SIZES)))
    torch.empty_like(q).fill_(torch.nan)
    for out in (
        attention(q, k, v, cu, cu, key_start=key_start, key_stop=key_stop, path="hopper"),
        run_paged(pages, table, q, cu, cu, key_start, key_stop, path="hopper"),
    ):
        assert (out.float() - wanted.float()).norm() <= 2**-7 * wanted.float().norm()
        assert not out[key_stop == 0].any()


def test_launches_on_two_streams_give_equal_results():
    skip_unless_supported("hopper", 64)
    q, k, v = (torch.randn(6000, heads, 64, device="cuda").bfloat16() for heads in (16, 4, 4))
    wanted = attention(q, k, v, [0, 6000], [0, 6000], path="hopper")
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outs = []
    for launch in range(20):
        with torch.cuda.stream(streams[launch % 2]):
            outs.append(attention(q, k, v, [0, 6000], [0, 6000], path="hopper"))
    torch.cuda.synchronize()
    assert all(torch.equal(out, wanted) for out in outs)


def test_hopper_output_is_bit_identical_across_runs():
    """Warps synchronize at barriers; a missing barrier would occasionally change the result."""
    skip_unless_supported("hopper", 128)
    generator = np.random.default_rng(0)
    for head_dim in prefill_sm90.HEAD_DIMS:
        q, k, v = (torch.randn(3000, heads, head_dim, device="cuda").bfloat16() for heads in (8, 2, 2))
        key_start, key_stop = visible_keys(3000, [(100, 700), (1000, 1001), (1500, 2800)])
        bounds = {"key_start": torch.from_numpy(key_start).cuda(), "key_stop": torch.from_numpy(key_stop).cuda()}
        first = attention(q, k, v, [0, 3000], [0, 3000], **bounds, path="hopper")
        for _ in range(int(generator.integers(60, 80))):
            torch.empty_like(q).fill_(torch.nan)
            assert torch.equal(first, attention(q, k, v, [0, 3000], [0, 3000], **bounds, path="hopper"))
