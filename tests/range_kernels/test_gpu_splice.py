"""The CUDA splice; needs a GPU: `make test-gpu`."""

import numpy as np
import pytest
import torch
from range_kernels import splice
from range_kernels.reference import splice as reference_splice

from tests.range_kernels.cases import DTYPES
from tests.range_kernels.gpu_calls import NEEDS_GPU

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("scale", [1.0, 3.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splice_casts_and_scales_as_torch_does(dtype, scale):
    """Items of every dtype in one launch, with 16-byte accesses and with narrower ones."""
    for hidden in (64, 576, 70, 5128):
        table = (torch.randn(50, hidden, device="cuda") * 100).to(dtype)
        ids = torch.randint(50, (40,), device="cuda")
        ranges = [(0, 7), (7, 8), (10, 20), (25, 40)]
        kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
        items = [
            (torch.randn(stop - start, hidden, device="cuda") * 7).to(kind)
            for (start, stop), kind in zip(ranges, kinds, strict=True)
        ]
        expected = table[ids] * scale
        for item, (start, stop) in zip(items, ranges, strict=True):
            expected[start:stop] = item.to(dtype)
        assert torch.equal(splice(ids, table, items, ranges, scale=scale), expected)


def test_strided_ids_equal_contiguous_ids():
    table = torch.randn(50, 64, device="cuda").half()
    ids = torch.randint(50, (20, 3), device="cuda")
    assert torch.equal(splice(ids[:, 1], table), table[ids[:, 1]])
    assert torch.equal(splice(ids.flatten()[::4], table), table[ids.flatten()[::4]])


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 64, 65, 1023, 1024, 1025, 1057, 3000])
def test_splice_matches_torch_with_many_ranges(count):
    generator = np.random.default_rng(count)
    widths, gaps = generator.integers(1, 4, count), generator.integers(0, 3, count)
    starts = np.cumsum(np.concatenate([[gaps[0]], widths[:-1] + gaps[1:]]))
    ranges = [(int(start), int(start + width)) for start, width in zip(starts, widths, strict=True)]
    table = torch.randn(50, 64, device="cuda").bfloat16()
    ids = torch.from_numpy(generator.integers(0, 50, ranges[-1][1] + 2)).cuda()
    items = [torch.randn(int(width), 64, device="cuda").bfloat16() for width in widths]
    expected = table[ids]
    for item, (start, stop) in zip(items, ranges, strict=True):
        expected[start:stop] = item
    assert torch.equal(splice(ids, table, items, ranges), expected)


def test_splice_reads_strided_and_unaligned_items():
    """Views with gaps between rows, chunks of a prompt, and rows that are not 16-byte aligned."""
    table = torch.randn(40, 512, device="cuda").bfloat16()
    ids = torch.randint(40, (90,), device="cuda")
    wide = torch.randn(30, 1024, device="cuda").bfloat16()
    items = [wide[:10, :512], wide[::3, 512:], torch.randn(5 * 512 + 1, device="cuda").bfloat16()[1:].view(5, 512)]
    ranges = [(3, 13), (20, 30), (85, 90)]
    expected = table[ids]
    for item, (start, stop) in zip(items, ranges, strict=True):
        expected[start:stop] = item
    for begin, end in ((0, 90), (5, 25), (30, 85)):
        for count in (2, 3):
            out = splice(ids[begin:end], table, items[:count], ranges[:count], offset=begin)
            wanted = expected if count == 3 else torch.cat([expected[:85], table[ids[85:]]])
            assert torch.equal(out, wanted[begin:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 3, 64, 576, 4096, 10240, 12296])
def test_splice_matches_the_reference(dtype, hidden):
    table = torch.randn(50, hidden).to(dtype)
    ids = torch.randint(50, (300,))
    ranges = [(0, 7), (7, 8), (100, 230), (299, 300)]
    items = [torch.randn(stop - start, hidden).to(dtype) for start, stop in ranges]
    out = splice(ids.cuda(), table.cuda(), [item.cuda() for item in items], ranges, scale=2.0)
    expected = reference_splice(
        ids.numpy(), table.float().numpy(), [item.float().numpy() for item in items], ranges, scale=2.0
    )
    assert torch.equal(out.float().cpu(), torch.from_numpy(expected))


def test_id_outside_the_table_gives_nan():
    out = splice(torch.tensor([1, 99]).cuda(), torch.randn(5, 8).cuda())
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
