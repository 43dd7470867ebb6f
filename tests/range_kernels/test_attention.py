"""CPU attention against the float64 reference and torch, and its invariance to packing, chunks and threads."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from range_kernels import CUDAGraphPlan, KVPages, attention, reference, visible_keys
from range_kernels.attention import query_bounds

from tests.range_kernels.cases import DTYPES, assert_close, make_case
from tests.range_kernels.paging import put_in_pages, run_paged

ROOT = Path(__file__).parents[2]


@st.composite
def cases(draw):
    lengths, spans = [], []
    for _ in range(draw(st.integers(1, 3))):
        keys = draw(st.sampled_from([1, 2, 17, 31, 32, 33, 64, 65, 127, 129, 260, 300]))
        queries = draw(st.integers(1, keys))
        cuts = sorted(draw(st.sets(st.integers(0, keys), max_size=4)))
        lengths.append((queries, keys))
        spans.append(list(zip(cuts[::2], cuts[1::2], strict=False)))
    return make_case(
        draw(st.integers(0, 2**31)),
        lengths,
        draw(st.sampled_from([(1, 1), (4, 2), (3, 1), (6, 6)])),
        draw(st.sampled_from([8, 64, 80, 96, 128])),
        draw(st.sampled_from(DTYPES)),
        spans,
        draw(st.none() | st.integers(1, 100)),
        draw(st.sampled_from(["inside", "union"])),
        draw(st.sampled_from([0.0, 0.0, 5.0, 50.0])),
    )


@settings(max_examples=60, deadline=None)
@given(cases())
def test_matches_the_float64_reference(case):
    out = attention(*case.args, key_start=case.key_start, key_stop=case.key_stop, softcap=case.softcap)
    assert_close(out, case)


def test_default_mask_is_causal_and_matches_torch():
    case = make_case(1, [(200, 200)], heads=(4, 4))
    q, k, v = (x.transpose(0, 1)[None] for x in case.args[:3])
    torch_out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
    assert torch.allclose(attention(*case.args), torch_out, atol=2e-6)


@pytest.mark.parametrize("spread", [0.05, 2.0], ids=["nearly equal weights", "peaked weights"])
def test_rounding_error_over_long_contexts_is_at_most_torchs(spread):
    """Against float64. With one long sum over the keys it was 1.5e-6 at 8,192 equal weights, torch's 2.6e-7."""
    generator = torch.Generator().manual_seed(0)
    keys, queries = 8192, 64
    k, v = (torch.randn(keys, 1, 32, generator=generator) for _ in range(2))
    q, k = torch.randn(queries, 2, 32, generator=generator) * spread, k * spread
    scores = torch.einsum("qhd,kd->hqk", q.double(), k[:, 0].double()) / 32**0.5
    mask = torch.full((queries, keys), float("-inf"), dtype=torch.float64).triu(keys - queries + 1)
    expected = torch.einsum("hqk,kd->qhd", torch.softmax(scores + mask, dim=-1), v[:, 0].double())
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k.expand(keys, 2, 32), v.expand(keys, 2, 32))), attn_mask=mask.float()
    )[0].transpose(0, 1)

    def error(out):
        return float(((out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())

    assert error(attention(q, k, v, [0, queries], [0, keys])) <= 1.1 * error(dense)


def test_window_equals_its_key_start():
    case = make_case(2, [(50, 90), (40, 40)], window=7)
    assert torch.equal(attention(*case.args, window=7), attention(*case.args, key_start=case.key_start))


def test_strided_views_equal_contiguous_tensors():
    stacked = torch.randn(70, 8, 64)
    q, k, v = stacked[:, :4], stacked[:, 4:6], stacked[:, 6:]
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), [0, 70], [0, 70])
    assert torch.equal(attention(q, k, v, [0, 70], [0, 70]), expected)


def test_packing_is_bit_identical():
    """A sequence's output does not depend on the other sequences in the pack."""
    alone = make_case(3, [(150, 150)])
    packed = make_case(4, [(33, 70), (150, 150), (1, 260)])
    for name in ("q", "k", "v"):
        start = 33 if name == "q" else 70
        getattr(packed, name)[start : start + 150] = getattr(alone, name)
    assert torch.equal(attention(*packed.args)[33:183], attention(*alone.args))


def test_chunked_prefill_equals_a_single_prefill():
    whole = make_case(5, [(300, 300)])
    expected = attention(*whole.args)
    for first, end in ((0, 100), (100, 299), (299, 300)):
        part = attention(whole.q[first:end], whole.k[:end], whole.v[:end], [0, end - first], [0, end])
        assert torch.allclose(part, expected[first:end], atol=2e-6)


def test_query_without_visible_keys_returns_zeros():
    case = make_case(6, [(40, 40)])
    case.key_stop[[0, 7]] = 0
    out = attention(*case.args, key_stop=case.key_stop)
    assert (out[[0, 7]] == 0).all()
    assert (out[8] != 0).any()


@pytest.mark.parametrize("queries", [1, 40])
def test_nan_query_gives_nan_in_its_own_row_only(queries):
    case = make_case(7, [(queries, 40)])
    case.q[-1] = torch.nan
    out = attention(*case.args)
    assert out[-1].isnan().all()
    assert not out[:-1].isnan().any()


def test_large_scores_give_finite_output():
    case = make_case(8, [(40, 40)])
    out = attention(case.q * 100, case.k * 100, case.v, [0, 40], [0, 40])
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: {"cu_seqlens_q": [0, 9]}, "cu_seqlens_q must rise from 0 to 10"),
        (lambda c: {"cu_seqlens_k": [0, 7, 5, 20]}, "cu_seqlens_k must rise"),
        (lambda c: {"cu_seqlens_k": [0, 5, 20]}, "1 sequences, cu_seqlens_k 2"),
        (lambda c: {"k": c.k[:, :, :8]}, "head_dim"),
        (lambda c: {"k": c.k.double()}, "float64"),
        (lambda c: {"v": c.v.half()}, "float16"),
        (lambda c: {"q": c.q[0]}, r"expected \[tokens, heads, head_dim\]"),
        (lambda c: {"q": c.q[:, :3]}, "3 query heads do not divide"),
        (lambda c: {"key_stop": c.key_stop[:3]}, "one per query"),
        (lambda c: {"key_start": c.key_start.long()}, "int64"),
        (lambda c: {"key_start": c.key_start, "window": 3}, "leave window out"),
        (lambda c: {"window": 0}, "window"),
        (lambda c: {"window": 4, "window_rule": "union"}, "needs the spans"),
        (lambda c: {"softcap": -1.0}, "softcap"),
    ],
)
def test_invalid_arguments_are_refused_by_name(change, words):
    case = make_case(9, [(10, 20)], head_dim=16)
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    given_args = dict(zip(names, case.args, strict=True))
    with pytest.raises(ValueError, match=words):
        attention(**{**given_args, **change(case)})


def test_more_queries_than_keys_is_refused():
    case = make_case(10, [(5, 5), (5, 5)])
    with pytest.raises(ValueError, match="sequence 1 has 7 queries but 5 keys"):
        attention(case.q, case.k, case.v, [0, 3, 10], [0, 5, 10])


def test_concurrent_calls_give_equal_results():
    from concurrent.futures import ThreadPoolExecutor

    case = make_case(11, [(130, 130)])
    expected = attention(*case.args)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: attention(*case.args), range(16)))
    assert all(torch.equal(result, expected) for result in results)


def test_bidirectional_span_attends_to_its_last_key():
    key_start, key_stop = visible_keys(6, [(1, 4)])
    q = torch.zeros(6, 1, 8)
    v = torch.eye(6)[:, None, :].repeat(1, 1, 2)[..., :8].contiguous()
    out = attention(q, q, v, [0, 6], [0, 6], key_start=torch.from_numpy(key_start), key_stop=torch.from_numpy(key_stop))
    seen = (out[:, 0, :6] > 0).numpy()
    assert seen[1].tolist() == [True, True, True, True, False, False]
    assert np.array_equal(seen.sum(axis=1), key_stop)


def test_simd_digest_matches_the_source():
    from range_kernels.cpu import attention as kernels
    from range_kernels.cpu.simd import DIGEST

    assert kernels.SIMD_DIGEST == DIGEST, f"simd.py changed: set SIMD_DIGEST in cpu/attention.py to {DIGEST!r}"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compiles for x86-64 processors")
def test_other_vector_widths_match_the_reference(tmp_path):
    """Compiles the code for processors without AVX-512 or AVX2 and runs it here."""
    code = """
import sys
from tests.range_kernels.cases import assert_close, make_case
from range_kernels import attention
from range_kernels.cpu.simd import WIDTH
case = make_case(1, [(70, 130), (33, 33)], head_dim=80, spans=[[(3, 90)], []], window=50)
assert_close(attention(*case.args, key_start=case.key_start, key_stop=case.key_stop), case)
print(WIDTH)
"""
    for name, features, width in (("generic", "+sse2", "4"), ("haswell", "+avx,+avx2,+fma", "8")):
        environment = {
            **os.environ,
            "NUMBA_CPU_NAME": name,
            "NUMBA_CPU_FEATURES": features,
            "NUMBA_CACHE_DIR": str(tmp_path),
        }
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == width, done.stderr


def test_output_is_bit_identical_for_any_number_of_threads():
    code = """
import hashlib
import torch
from tests.range_kernels.cases import assert_close, make_case
from range_kernels import attention
from range_kernels.cpu import launch
torch.manual_seed(5)
case = make_case(2, [(300, 300), (33, 290)], head_dim=64, spans=[[(3, 90)], []])
out = attention(*case.args, key_start=case.key_start, key_stop=case.key_stop)
assert_close(out, case)
weight, x = torch.randn(700, 640), torch.randn(90, 640)
product = launch.linear(x, launch.pack_weights(weight), 700)
torch.testing.assert_close(product.double(), x.double() @ weight.double().T, rtol=1e-4, atol=1e-3)
print(*(hashlib.sha256(each.numpy().tobytes()).hexdigest() for each in (out, product)))
"""
    digests = set()
    for threads in ("1", "3"):
        environment = {**os.environ, "NUMBA_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.stdout, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"softcap": float("nan")}, "softcap"),
        ({"softcap": 1e39}, "softcap"),
        ({"window_rule": "both"}, "window_rule"),
        ({"window": float("nan")}, "window"),
        ({"window": 2.5}, "window"),
    ],
)
def test_invalid_numbers_are_refused(arguments, words):
    case = make_case(12, [(10, 20)], head_dim=16)
    with pytest.raises(ValueError, match=words):
        attention(*case.args, **arguments)


def test_float_lengths_are_refused_and_a_huge_window_has_no_effect():
    case = make_case(13, [(10, 20)], head_dim=16)
    with pytest.raises(ValueError, match="must contain integers"):
        attention(*case.args[:3], [0, 10.0], [0, 20])
    assert torch.equal(attention(*case.args, window=2**40), attention(*case.args))


def test_cuda_graph_plan_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="float32 with 4 query and 2 KV heads of 64 on cpu: a CUDAGraphPlan needs"):
        CUDAGraphPlan(1, 1, 1, KVPages(1, 1, 32, 2, 64), 4)


@pytest.mark.parametrize("level", [-200.0, -1.0, 0.5, 3.0, 90.0])
def test_sinks_take_their_share(level):
    """Logits far below and far above the scores, for a prefill of several blocks of keys."""
    generator = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(generator.standard_normal((600, heads, 16)).astype(np.float32)) for heads in (4, 2, 2))
    cu = [0, 7, 600]
    key_start, key_stop = query_bounds(None, None, np.array(cu), np.array(cu), 400, q)
    sinks = torch.tensor([level, level + 1, -level / 9, 0.0])
    pages, table = put_in_pages(generator, k, v, np.array(cu), 64)
    found = run_paged(pages, table, q, cu, cu, key_start, key_stop, sinks=sinks)
    expected = reference.attention(
        *(x.numpy() for x in (q, k, v)), cu, cu, key_start=key_start.numpy(), key_stop=key_stop.numpy(), scale=0.25, sinks=sinks.numpy()
    )  # fmt: skip
    assert np.abs(found.numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("sinks", [torch.zeros(3), torch.zeros(4, dtype=torch.float64)])
def test_wrong_sinks_are_named(sinks):
    generator = np.random.default_rng(0)
    k = torch.zeros(5, 2, 16)
    pages, table = put_in_pages(generator, k, k, np.array([0, 5]), 64)
    with pytest.raises(ValueError, match="sinks are"):
        run_paged(pages, table, torch.zeros(5, 4, 16), [0, 5], [0, 5], None, None, sinks=sinks)
