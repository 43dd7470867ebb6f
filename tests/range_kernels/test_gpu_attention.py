"""Packed attention on every CUDA path; needs a GPU: `make test-gpu`."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from range_kernels import attention
from range_kernels.cuda import prefill_sm80

from tests.range_kernels.cases import DTYPES, assert_close, make_case
from tests.range_kernels.gpu_calls import (
    NEEDS_GPU,
    PATHS,
    assert_error_at_most_twice_torch,
    random_call,
    skip_unless_supported,
)
from tests.range_kernels.test_attention import cases

pytestmark = NEEDS_GPU


@settings(max_examples=150, deadline=None)
@given(cases())
def test_attention_matches_the_float64_reference(case):
    there = case.to("cuda")
    out = attention(*there.args, key_start=there.key_start, key_stop=there.key_stop, softcap=case.softcap)
    assert out.is_cuda
    assert_close(out, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 63, 65, 127, 128, 129, 1000])
def test_attention_matches_the_reference_at_odd_sizes(keys, dtype):
    for queries in {1, min(keys, 64), keys}:
        case = make_case(keys, [(queries, keys)], head_dim=256 if keys == 129 else 64, dtype=dtype)
        assert_close(attention(*case.to("cuda").args), case)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_tensor_core_error_is_at_most_twice_torch_error(head_dim, dtype, softcap, path):
    """Errors are against float64; torch runs in the same dtype; output memory is filled with NaN beforehand."""
    skip_unless_supported(path, head_dim)
    generator = np.random.default_rng(head_dim + int(softcap))
    for _ in range(25):
        case = random_call(generator, head_dim, dtype)
        key_start, key_stop = case[5:]
        torch.empty_like(case[0]).fill_(torch.nan)  # freed immediately: the output probably reuses this memory
        out = attention(*case[:5], key_start=key_start, key_stop=key_stop, softcap=softcap, path=path)
        assert_error_at_most_twice_torch(out, case, softcap)


@pytest.mark.parametrize("path", PATHS)
def test_tensor_cores_accept_views_and_queries_without_visible_keys(path):
    skip_unless_supported(path, 64)
    make = torch.Generator("cuda").manual_seed(0)
    packed = torch.randn(300, 12, 64, generator=make, device="cuda").bfloat16()
    q, k, v = packed[:, :8], packed[:, 8:10], packed[:, 10:]
    key_start = torch.zeros(300, dtype=torch.int32, device="cuda")
    key_stop = torch.arange(1, 301, dtype=torch.int32, device="cuda")
    key_stop[[0, 70, 299]] = 0
    out = attention(q, k, v, [0, 300], [0, 300], key_start=key_start, key_stop=key_stop, path=path)
    plain = attention(q, k, v, [0, 300], [0, 300], key_start=key_start, key_stop=key_stop, path="plain")
    assert (out[[0, 70, 299]] == 0).all()
    # Softmax weights are rounded to bfloat16 (2 ** -9) before the product with the values, outputs after it.
    assert (out.float() - plain.float()).norm() <= 2**-7 * plain.float().norm()


@pytest.mark.parametrize("path", [*PATHS, "plain"])
def test_nan_query_gives_nan_in_its_own_row_only(path):
    skip_unless_supported(path, 64)
    q, k, v = (torch.randn(300, heads, 64, device="cuda").bfloat16() for heads in (8, 2, 2))
    q[77] = torch.nan
    out = attention(q, k, v, [0, 300], [0, 300], path=path)
    assert out[77].isnan().all()
    assert not out[torch.arange(300) != 77].isnan().any()


def test_plain_kernel_is_used_if_shared_memory_is_too_small(monkeypatch):
    monkeypatch.setattr(prefill_sm80, "max_smem_per_block", lambda device: 99 << 10)
    q = torch.randn(3, 1, 256, device="cuda").half()
    with pytest.raises(ValueError, match="101904 bytes of shared memory"):
        attention(q, q, q, [0, 3], [0, 3], path="tensor-core")
    assert torch.equal(attention(q, q, q, [0, 3], [0, 3]), attention(q, q, q, [0, 3], [0, 3], path="plain"))


@pytest.mark.parametrize("path", PATHS)
def test_any_memory_layout_is_bit_identical_to_contiguous(path):
    """Heads first, heads that share memory, one token or head with an odd stride, an unaligned start."""
    skip_unless_supported(path, 64)
    flat = torch.randn(400 * 8 * 64 + 1, device="cuda").half()
    ways = {
        "heads first": flat[:-1].view(8, 400, 64).transpose(0, 1),
        "shared heads": flat[: 400 * 64].view(400, 1, 64).expand(-1, 8, -1),
        "one head": flat[: 400 * 64].as_strided((400, 1, 64), (64, 7, 1)),
        "one token": flat.as_strided((1, 8, 64), (515, 64, 1)),
        "odd beginning": flat[1:].view(400, 8, 64),
    }
    for name, x in ways.items():
        cu = [0, len(x)]
        out = attention(x, x, x, cu, cu, path=path)
        plain = x.clone(memory_format=torch.contiguous_format)
        assert torch.equal(out, attention(plain, plain, plain, cu, cu, path=path)), name


def test_unsupported_path_is_refused_by_name():
    case = make_case(0, [(3, 3)], head_dim=72, dtype=torch.float32).to("cuda")
    with pytest.raises(ValueError, match=r"path='tensor-core' does not compute torch.float32, head_dim=72"):
        attention(*case.args, path="tensor-core")
    with pytest.raises(ValueError, match="path='fast' does not compute"):
        attention(*case.args, path="fast")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_nan_of_one_sequence_does_not_reach_its_neighbours(head_dim, path):
    """The last tile of a sequence extends past its end into the next sequence's keys."""
    skip_unless_supported(path, head_dim)
    lengths = [0, 70, 200, 450]
    q, k, v = (torch.randn(450, 2, head_dim, device="cuda").half() for _ in range(3))
    clean = attention(q, k, v, lengths, lengths, path=path)
    for x in (q, k, v):
        x[70:200] = torch.nan
    spoilt = attention(q, k, v, lengths, lengths, path=path)
    assert torch.equal(spoilt[:70], clean[:70])
    assert torch.equal(spoilt[200:], clean[200:])
    assert spoilt[70:200].isnan().all()


def test_too_large_head_dim_is_refused():
    case = make_case(0, [(3, 3)], head_dim=320).to("cuda")
    with pytest.raises(ValueError, match="head_dim=320"):
        attention(*case.args)
