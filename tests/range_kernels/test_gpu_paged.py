"""Paged attention, prefills and decode steps; needs a GPU: `make test-gpu`."""

from itertools import accumulate

import numpy as np
import pytest
import torch
from range_kernels import attention
from range_kernels.cuda import decode_split_kv, prefill_sm80
from range_kernels.kv_cache import PAGE_SIZES

from tests.range_kernels.cases import DTYPES
from tests.range_kernels.gpu_calls import (
    NEEDS_GPU,
    PATHS,
    assert_error_at_most_twice_torch,
    random_call,
    skip_unless_supported,
)
from tests.range_kernels.paging import last_keys, put_in_pages, run_paged

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_paged_attention_error_is_at_most_twice_torch_error(head_dim, dtype, softcap, path):
    """Decode steps, chunks and whole prompts in one batch; pages in random order, with NaN in unused slots."""
    skip_unless_supported(path, head_dim)
    generator = np.random.default_rng(head_dim + int(softcap))
    for _ in range(25):
        case = random_call(generator, head_dim, dtype, decoding=True)
        q, k, v, cu_q, cu_k, key_start, key_stop = case
        pages, table = put_in_pages(generator, k, v, cu_k, int(generator.choice(PAGE_SIZES)))
        torch.empty_like(q).fill_(torch.nan)
        out = run_paged(pages, table, q, cu_q, cu_k, key_start, key_stop, softcap=softcap, path=path)
        assert_error_at_most_twice_torch(out, case, softcap)
        again = run_paged(pages, table, q, cu_q, cu_k, key_start, key_stop, softcap=softcap, path=path)
        assert torch.equal(out, again)  # splits are combined in a fixed order, and counters are reset to zero


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_new_keys_are_written_before_they_are_read(queries, page_size):
    """Written by the decode kernel itself (1 and 3 queries with groups of 4 heads) or before a prefill."""
    generator = np.random.default_rng(page_size + queries)
    lengths = np.array([queries, 130, 700, 770, 5000])  # with 770, three new keys cross a split boundary
    cu_k = np.concatenate([[0], np.cumsum(lengths)])
    cu_q = np.arange(len(lengths) + 1) * queries
    k, v = (torch.randn(int(cu_k[-1]), 2, 64, device="cuda").bfloat16() for _ in range(2))
    packed = torch.randn(int(cu_q[-1]), 12, 64, device="cuda").bfloat16()
    q = packed[:, :8]
    last = last_keys(cu_q, cu_k)
    key_start = torch.zeros(len(q), dtype=torch.int32, device="cuda")
    key_stop = torch.from_numpy((last + 1 - np.repeat(cu_k[:-1], queries)).astype(np.int32)).cuda()
    key_stop[2 * queries : 3 * queries] = 0  # a sequence without visible keys still writes its new keys
    pages, table = put_in_pages(generator, k, v, cu_k, page_size)
    new = packed[:, 8:10], packed[:, 10:]
    out = run_paged(pages, table, q, cu_q, cu_k, key_start, key_stop, new=new)
    k[last], v[last] = new
    wanted, wanted_table = put_in_pages(np.random.default_rng(page_size + queries), k, v, cu_k, page_size)
    assert np.array_equal(table, wanted_table)
    for mine, theirs in ((pages.keys, wanted.keys), (pages.values, wanted.values)):
        assert torch.equal(mine.view(torch.int16), theirs.view(torch.int16))
    assert torch.equal(out, run_paged(wanted, table, q, cu_q, cu_k, key_start, key_stop))
    assert not out[2 * queries : 3 * queries].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_paged_attention_equals_plain_packed_attention(dtype):
    generator = np.random.default_rng(5)
    for _ in range(10):
        case = random_call(generator, 72, dtype, decoding=True)
        q, k, v, cu_q, cu_k, key_start, key_stop = case
        pages, table = put_in_pages(generator, k, v, cu_k, 16)
        out = run_paged(pages, table, q, cu_q, cu_k, key_start, key_stop, path="plain")
        assert torch.equal(out, attention(q, k, v, cu_q, cu_k, key_start=key_start, key_stop=key_stop, path="plain"))


def test_decode_shows_nan_in_the_affected_sequence_only():
    """NaN in a query of a sequence with one split and with several, and in a key and a value of one split."""
    lengths = [40, 5000, 5000]
    cu_k = [0, *accumulate(lengths)]
    q, k, v = (
        torch.randn(rows, heads, 128, device="cuda").half() for rows, heads in ((3, 8), (cu_k[-1], 2), (cu_k[-1], 2))
    )
    key_start = torch.zeros(3, dtype=torch.int32, device="cuda")
    key_stop = torch.tensor(list(lengths), dtype=torch.int32, device="cuda")
    for poison, spoilt in ((q[0], 0), (q[1], 1), (k[40 + 4000, 1], 1), (v[40 + 4000, 1], 1)):
        before = poison.clone()
        poison[:] = torch.nan
        pages, table = put_in_pages(np.random.default_rng(0), k, v, cu_k, 64)
        out = run_paged(pages, table, q, [0, 1, 2, 3], cu_k, key_start, key_stop)
        poison[:] = before
        assert out[spoilt, 4:].isnan().all()  # heads of the second KV head
        assert out[[row for row in range(3) if row != spoilt]].isfinite().all()


@pytest.mark.parametrize(
    ("head_dim", "room", "shape", "stages"),
    [(96, 99 << 10, (128, 2), 3), (128, 99 << 10, (64, 2), 2), (256, 163 << 10, (64, 1), 2)],
)
def test_shapes_for_less_shared_memory_err_at_most_twice_as_torch(head_dim, room, shape, stages, monkeypatch):
    """Runs the tile shapes of a GeForce and an A100 on this GPU."""
    for module in (prefill_sm80, decode_split_kv):
        monkeypatch.setattr(module, "max_smem_per_block", lambda device: room)
    assert prefill_sm80.choose_shape(head_dim, room) == prefill_sm80.Shape(*shape)
    assert decode_split_kv.choose_stages(head_dim, 1, 132, room) == stages
    generator = np.random.default_rng(head_dim)
    for decoding in (False, True) * 4:
        case = random_call(generator, head_dim, torch.bfloat16, decoding)
        q, k, v, cu_q, cu_k, key_start, key_stop = case
        pages, table = put_in_pages(generator, k, v, cu_k, 32)
        for out in (
            attention(*case[:5], key_start=key_start, key_stop=key_stop, path="tensor-core"),
            run_paged(pages, table, q, cu_q, cu_k, key_start, key_stop, path="tensor-core"),
        ):
            assert_error_at_most_twice_torch(out, case)
