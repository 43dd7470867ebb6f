"""CUDA kernels written in plain Numba, run in Numba's simulator: `NUMBA_ENABLE_CUDASIM=1 pytest tests/simulator`."""

import numpy as np
import pytest
import torch
from numba.core import config

if not config.ENABLE_CUDASIM:
    pytest.skip(
        "needs NUMBA_ENABLE_CUDASIM=1, set before Numba is imported (`make test` does)", allow_module_level=True
    )

from range_kernels.clipping import clip_items
from range_kernels.cuda import delta_net, prefill_simt, splice
from range_kernels.reference import causal_convolution, gated_delta_rule
from range_kernels.reference import splice as reference_splice

from tests.range_kernels.cases import DTYPES, assert_close, make_case

CASES = {  # few queries: the simulator runs a Python thread per CUDA thread, 128 per block
    "two sequences": {"lengths": [(2, 2), (1, 140)], "heads": (2, 1)},
    "spans and window": {"lengths": [(5, 9)], "spans": [[(3, 6), (7, 8)]], "window": 4},
    "union window": {"lengths": [(4, 9)], "spans": [[(3, 8)]], "window": 2, "window_rule": "union"},
    "softcap": {"lengths": [(2, 7)], "softcap": 8.0},
    "one head, wide": {"lengths": [(2, 3)], "head_dim": 160},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_matches_the_float64_reference(name, dtype):
    case = make_case(0, **{"heads": (1, 1), "head_dim": 16, "dtype": dtype, **CASES[name]})
    out = torch.full_like(case.q, torch.nan)
    lengths = [np.array(x, np.int32) for x in (case.cu_seqlens_q, case.cu_seqlens_k)]
    prefill_simt.launch(
        case.q, case.k, case.v, out, case.key_start, case.key_stop, *lengths, case.q.shape[-1] ** -0.5, case.softcap
    )
    assert_close(out, case)


def test_query_without_visible_keys_returns_zeros():
    case = make_case(1, [(4, 4)], head_dim=8)
    case.key_stop[2] = 0
    out = torch.full_like(case.q, torch.nan)
    lengths = np.array([0, 4], np.int32)
    prefill_simt.launch(case.q, case.k, case.v, out, case.key_start, case.key_stop, lengths, lengths, 1.0, 0.0)
    assert (out[2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [3, 8, 130])
def test_splice_matches_the_reference(dtype, hidden):
    table = torch.randn(9, hidden).to(dtype)
    items, ranges = [torch.randn(3, hidden).to(dtype), torch.randn(2, hidden).to(dtype)], [(1, 4), (6, 8)]
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.int64)
    for begin, end in ((0, 9), (2, 7)):
        clipped = clip_items(items, ranges, table, begin, end)
        out = torch.full((end - begin, hidden), torch.nan, dtype=dtype)
        splice.launch(ids[begin:end], table, clipped, out, 2.0)
        expected = reference_splice(
            ids[begin:end].numpy(),
            table.float().numpy(),
            [item.float().numpy() for item in items],
            ranges,
            offset=begin,
            scale=2.0,
        )
        assert np.array_equal(out.float().numpy(), expected)


def test_splice_reads_unaligned_views():
    table = torch.randn(4 * 5 + 1)[1:].view(5, 4)
    item = torch.randn(4 + 1)[1:].view(1, 4)
    clipped = clip_items([item], [(0, 1)], table, 0, 2)
    out = torch.zeros(2, 4)
    splice.launch(torch.tensor([0, 3]), table, clipped, out, 1.0)
    assert torch.equal(out, torch.stack([item[0], table[3]]))


def test_id_outside_the_table_gives_nan():
    table = torch.randn(5, 4)
    out = torch.zeros(2, 4)
    splice.launch(torch.tensor([1, 7], dtype=torch.int32), table, [], out, 1.0)
    assert torch.equal(out[0], table[1])
    assert out[1].isnan().all()


def test_the_delta_rule_matches_the_reference():
    """Two sequences, the second in two chunks; each thread keeps a column of the state."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(5, 1, 4, generator=generator) for _ in range(2))
    v, decay = torch.randn(5, 2, 3, generator=generator), -torch.rand(5, 2, generator=generator)
    beta = torch.rand(5, 2, generator=generator)
    states, out = torch.full((3, 2, 4, 3), torch.nan), torch.full((5, 2, 3), torch.nan)
    for cu, slots, fresh, part in (
        ([0, 2, 4], [2, 0], [True, True], slice(0, 4)),
        ([0, 1], [0], [False], slice(4, 5)),
    ):
        given = [torch.tensor(each) for each in (cu, slots, fresh)]
        rows = [x[part].contiguous() for x in (q, k, v, decay, beta)]
        found = torch.full((part.stop - part.start, 2, 3), torch.nan)
        delta_net.launch_delta_rule(*rows, *given, states, found)
        out[part] = found
    for part, slot in ((slice(0, 2), 2), (slice(2, 5), 0)):
        wanted, state = gated_delta_rule(*(x[part].double().numpy() for x in (q, k, v, decay, beta)))
        assert np.abs(out[part].numpy() - wanted).max() < 1e-6
        assert np.abs(states[slot].numpy() - state).max() < 1e-6
    assert states[1].isnan().all()


def test_the_convolution_matches_the_reference():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 5, generator=generator), torch.randn(4, 5, generator=generator)
    states, out = torch.full((2, 3, 5), torch.nan), torch.full((6, 5), torch.nan)
    for fresh, part in ((True, slice(0, 2)), (False, slice(2, 6))):
        given = [torch.tensor(each) for each in ([0, part.stop - part.start], [1], [fresh])]
        found = torch.full((part.stop - part.start, 5), torch.nan)
        delta_net.launch_convolution(x[part].contiguous(), weight, *given, states, found)
        out[part] = found
    wanted = causal_convolution(x.double().numpy(), weight.double().numpy())
    assert np.abs(out.numpy() - wanted).max() < 1e-6
    assert states[0].isnan().all()
