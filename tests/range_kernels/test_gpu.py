"""The CUDA kernels on a GPU: `make test-gpu`."""

import pytest
import torch
from hypothesis import given, settings
from range_kernels import attention, splice
from range_kernels.reference import splice as splice_oracle

from .cases import DTYPES, assert_close, make_case
from .test_attention import cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@settings(max_examples=150, deadline=None)
@given(cases())
def test_attention_matches_the_oracle(case):
    there = case.to("cuda")
    out = attention(*there.args, low=there.low, reach=there.reach, softcap=case.softcap)
    assert out.is_cuda
    assert_close(out, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 63, 65, 127, 128, 129, 1000])
def test_attention_at_odd_sizes(keys, dtype):
    for queries in {1, min(keys, 64), keys}:
        case = make_case(keys, [(queries, keys)], head_dim=256 if keys == 129 else 64, dtype=dtype)
        assert_close(attention(*case.to("cuda").args), case)


def test_a_head_too_large_is_refused():
    case = make_case(0, [(3, 3)], head_dim=320).to("cuda")
    with pytest.raises(ValueError, match="head_dim=320"):
        attention(*case.args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 3, 64, 576, 4096])
def test_splice_matches_the_oracle(dtype, hidden):
    table = torch.randn(50, hidden).to(dtype)
    ids = torch.randint(50, (300,))
    ranges = [(0, 7), (7, 8), (100, 230), (299, 300)]
    items = [torch.randn(stop - start, hidden).to(dtype) for start, stop in ranges]
    out = splice(ids.cuda(), table.cuda(), [item.cuda() for item in items], ranges, scale=2.0)
    expected = splice_oracle(
        ids.numpy(), table.float().numpy(), [item.float().numpy() for item in items], ranges, scale=2.0
    )
    assert torch.equal(out.float().cpu(), torch.from_numpy(expected))


def test_an_id_outside_the_table_shows_as_nan():
    out = splice(torch.tensor([1, 99]).cuda(), torch.randn(5, 8).cuda())
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_kernels_follow_pytorchs_stream():
    """The same result when a slow producer is still running on the current stream."""
    case = make_case(1, [(200, 200)]).to("cuda")
    expected = attention(*case.args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(case.q)
        busy = torch.randn(4000, 4000, device="cuda")
        for _ in range(10):
            busy = busy @ busy * 1e-4
        late.copy_(case.q)
        out = attention(late, *case.args[1:])
    stream.synchronize()
    assert torch.equal(out, expected)
