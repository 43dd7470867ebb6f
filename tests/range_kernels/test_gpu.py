"""The CUDA kernels on a GPU: `make test-gpu`."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from range_kernels import PagedPlan, SplicePlan, attention, paged_attention, splice, visible_keys
from range_kernels.cuda import decode, hopper, tensor_core
from range_kernels.cuda import splice as wide
from range_kernels.cuda.kernel import Kernel
from range_kernels.pages import PAGE_SIZES
from range_kernels.reference import splice as splice_oracle

from .cases import DTYPES, assert_close, make_case
from .paging import LAYER, last_keys, put_in_pages, run_paged
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


def random_call(generator, head_dim, dtype, decoding=False):
    """Packed sequences of random lengths, some chunked, with spans and windows; q, k, v and bounds on the GPU.

    `decoding`: most sequences have a few queries at the end of many keys.
    """
    kv_heads = int(generator.integers(1, 4))
    heads = kv_heads * int(generator.integers(1, 4))
    queries, keys, lows, reaches = [], [], [], []
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
        low, reach = visible_keys(length, spans, first=first, window=window, window_rule=rule)
        queries.append(length - first)
        keys.append(length)
        lows.append(low)
        reaches.append(reach)
    total_q, total_k = sum(queries), sum(keys)
    make = torch.Generator("cuda").manual_seed(int(generator.integers(2**31)))
    q, k, v = (
        torch.randn(total, count, head_dim, generator=make, device="cuda").to(dtype)
        for total, count in ((total_q, heads), (total_k, kv_heads), (total_k, kv_heads))
    )
    bounds = [torch.from_numpy(np.concatenate(each)).cuda() for each in (lows, reaches)]
    return q, k, v, [0, *accumulate(queries)], [0, *accumulate(keys)], *bounds


def dense(q, k, v, cu_q, cu_k, low, reach, softcap, dtype):
    """Attention with a dense mask and plain torch operations in `dtype`, one sequence after the other."""
    outs = []
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        group = q.shape[1] // k.shape[1]
        x, y, z = (t.to(dtype).transpose(0, 1) for t in (q[a:b], k[c:d], v[c:d]))
        y, z = (t.repeat_interleave(group, dim=0) for t in (y, z))
        place = torch.arange(d - c, device="cuda")
        seen = (place >= low[a:b, None]) & (place <= reach[a:b, None])
        if softcap:
            scores = torch.tanh(x @ y.transpose(1, 2) * q.shape[2] ** -0.5 / softcap) * softcap
            weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
            outs.append((weights @ z).transpose(0, 1))
        else:
            outs.append(torch.nn.functional.scaled_dot_product_attention(x, y, z, attn_mask=seen).transpose(0, 1))
    return torch.cat(outs)


def runs(path, head_dim):
    """Skip where this GPU has no such path, or it has no such head size."""
    if path == "hopper" and (torch.cuda.get_device_capability()[0] != 9 or head_dim not in hopper.HEAD_DIMS):
        pytest.skip("no hopper path here")


PATHS = ["tensor-core", "hopper"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_tensor_cores_err_at_most_twice_as_much_as_torch(head_dim, dtype, softcap, path):
    """Error against float64, beside that of torch's attention in the same dtype; outputs are poisoned before."""
    runs(path, head_dim)
    generator = np.random.default_rng(head_dim + int(softcap))
    for _ in range(25):
        case = random_call(generator, head_dim, dtype)
        low, reach = case[5:]
        truth = dense(*case, softcap, torch.float64)
        torch.empty_like(case[0]).fill_(torch.nan)  # freed at once: the output is likely to lie here
        out = attention(*case[:5], low=low, reach=reach, softcap=softcap, path=path)
        theirs = dense(*case, softcap, dtype)
        mine = (out.double() - truth).norm()
        assert mine <= 2 * (theirs.double() - truth).norm() + 1e-12, (
            f"{mine} against {(theirs.double() - truth).norm()}"
        )
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_paged_attention_errs_at_most_twice_as_much_as_torch(head_dim, dtype, softcap, path):
    """Decode steps, chunks and whole prompts in one batch, over pages in any order whose free places hold NaN."""
    runs(path, head_dim)
    generator = np.random.default_rng(head_dim + int(softcap))
    for _ in range(25):
        case = random_call(generator, head_dim, dtype, decoding=True)
        q, k, v, cu_q, cu_k, low, reach = case
        truth = dense(*case, softcap, torch.float64)
        pages, table = put_in_pages(generator, k, v, cu_k, int(generator.choice(PAGE_SIZES)))
        torch.empty_like(q).fill_(torch.nan)
        out = run_paged(pages, table, q, cu_q, cu_k, low, reach, softcap=softcap, path=path)
        theirs = dense(*case, softcap, dtype)
        mine = (out.double() - truth).norm()
        assert mine <= 2 * (theirs.double() - truth).norm() + 1e-12
        assert torch.isfinite(out).all()
        again = run_paged(pages, table, q, cu_q, cu_k, low, reach, softcap=softcap, path=path)
        assert torch.equal(out, again)  # splits are joined in one order, and counters are back at zero


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_new_keys_are_written_before_they_are_read(queries, page_size):
    """By the decode kernel itself (1 and 3 queries of a group of 4), or before a prefill."""
    generator = np.random.default_rng(page_size + queries)
    lengths = np.array([queries, 130, 700, 770, 5000])  # of 770, three new keys lie on both sides of an item's border
    cu_k = np.concatenate([[0], np.cumsum(lengths)])
    cu_q = np.arange(len(lengths) + 1) * queries
    k, v = (torch.randn(int(cu_k[-1]), 2, 64, device="cuda").bfloat16() for _ in range(2))
    packed = torch.randn(int(cu_q[-1]), 12, 64, device="cuda").bfloat16()
    q = packed[:, :8]
    last = last_keys(cu_q, cu_k)
    low = torch.zeros(len(q), dtype=torch.int32, device="cuda")
    reach = torch.from_numpy((last - np.repeat(cu_k[:-1], queries)).astype(np.int32)).cuda()
    reach[2 * queries : 3 * queries] = -1  # a sequence that sees nothing has keys to write, too
    pages, table = put_in_pages(generator, k, v, cu_k, page_size)
    new = packed[:, 8:10], packed[:, 10:]
    out = run_paged(pages, table, q, cu_q, cu_k, low, reach, new=new)
    k[last], v[last] = new
    wanted, wanted_table = put_in_pages(np.random.default_rng(page_size + queries), k, v, cu_k, page_size)
    assert np.array_equal(table, wanted_table)
    for mine, theirs in ((pages.keys, wanted.keys), (pages.values, wanted.values)):
        assert torch.equal(mine.view(torch.int16), theirs.view(torch.int16))
    assert torch.equal(out, run_paged(wanted, table, q, cu_q, cu_k, low, reach))
    assert not out[2 * queries : 3 * queries].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paged_attention_by_the_plain_kernel(dtype):
    generator = np.random.default_rng(5)
    for _ in range(10):
        case = random_call(generator, 72, dtype, decoding=True)
        q, k, v, cu_q, cu_k, low, reach = case
        pages, table = put_in_pages(generator, k, v, cu_k, 16)
        out = run_paged(pages, table, q, cu_q, cu_k, low, reach, path="plain")
        assert torch.equal(out, attention(q, k, v, cu_q, cu_k, low=low, reach=reach, path="plain"))


@pytest.mark.parametrize("path", PATHS)
def test_tensor_cores_take_views_and_queries_that_see_nothing(path):
    runs(path, 64)
    make = torch.Generator("cuda").manual_seed(0)
    packed = torch.randn(300, 12, 64, generator=make, device="cuda").bfloat16()
    q, k, v = packed[:, :8], packed[:, 8:10], packed[:, 10:]
    low = torch.zeros(300, dtype=torch.int32, device="cuda")
    reach = torch.arange(300, dtype=torch.int32, device="cuda")
    reach[[0, 70, 299]] = -1
    out = attention(q, k, v, [0, 300], [0, 300], low=low, reach=reach, path=path)
    plain = attention(q, k, v, [0, 300], [0, 300], low=low, reach=reach, path="plain")
    assert (out[[0, 70, 299]] == 0).all()
    # Weights are rounded to bfloat16 (2 ** -9) before they meet the values, outputs after.
    assert (out.float() - plain.float()).norm() <= 2**-7 * plain.float().norm()


@pytest.mark.parametrize("path", [*PATHS, "plain"])
def test_nan_is_not_hidden(path):
    runs(path, 64)
    q, k, v = (torch.randn(300, heads, 64, device="cuda").bfloat16() for heads in (8, 2, 2))
    q[77] = torch.nan
    out = attention(q, k, v, [0, 300], [0, 300], path=path)
    assert out[77].isnan().all()
    assert not out[torch.arange(300) != 77].isnan().any()


def test_decode_does_not_hide_nan():
    """In a sequence of one item, and in one that is split: a query, and a key in one of the parts."""
    lengths = [40, 5000, 5000]
    cu_k = [0, *accumulate(lengths)]
    q, k, v = (
        torch.randn(rows, heads, 128, device="cuda").half() for rows, heads in ((3, 8), (cu_k[-1], 2), (cu_k[-1], 2))
    )
    low = torch.zeros(3, dtype=torch.int32, device="cuda")
    reach = torch.tensor([length - 1 for length in lengths], dtype=torch.int32, device="cuda")
    for poison, spoilt in ((q[0], 0), (q[1], 1), (k[40 + 4000, 1], 1), (v[40 + 4000, 1], 1)):
        before = poison.clone()
        poison[:] = torch.nan
        pages, table = put_in_pages(np.random.default_rng(0), k, v, cu_k, 64)
        out = run_paged(pages, table, q, [0, 1, 2, 3], cu_k, low, reach)
        poison[:] = before
        assert out[spoilt, 4:].isnan().all()  # heads of the second KV head
        assert out[[row for row in range(3) if row != spoilt]].isfinite().all()


@pytest.mark.parametrize(
    ("head_dim", "room", "shape", "stages"),
    [(96, 99 << 10, (128, 2), 3), (128, 99 << 10, (64, 2), 2), (256, 163 << 10, (64, 1), 2)],
)
def test_gpus_with_less_shared_memory(head_dim, room, shape, stages, monkeypatch):
    """The shapes that a GeForce and an A100 take, on this GPU."""
    for module in (tensor_core, decode):
        monkeypatch.setattr(module, "block_room", lambda device: room)
    assert tensor_core.choose_shape(head_dim, room) == tensor_core.Shape(*shape)
    assert decode.choose_stages(head_dim, 1, 132, room) == stages
    generator = np.random.default_rng(head_dim)
    for decoding in (False, True) * 4:
        case = random_call(generator, head_dim, torch.bfloat16, decoding)
        q, k, v, cu_q, cu_k, low, reach = case
        truth, theirs = dense(*case, 0.0, torch.float64), dense(*case, 0.0, torch.bfloat16)
        pages, table = put_in_pages(generator, k, v, cu_k, 32)
        for out in (
            attention(*case[:5], low=low, reach=reach, path="tensor-core"),
            run_paged(pages, table, q, cu_q, cu_k, low, reach, path="tensor-core"),
        ):
            assert (out.double() - truth).norm() <= 2 * (theirs.double() - truth).norm() + 1e-12


def test_a_gpu_without_room_for_a_head_size_takes_the_plain_kernel(monkeypatch):
    monkeypatch.setattr(tensor_core, "block_room", lambda device: 99 << 10)
    q = torch.randn(3, 1, 256, device="cuda").half()
    with pytest.raises(ValueError, match="163 KiB of shared memory"):
        attention(q, q, q, [0, 3], [0, 3], path="tensor-core")
    assert torch.equal(attention(q, q, q, [0, 3], [0, 3]), attention(q, q, q, [0, 3], [0, 3], path="plain"))


@pytest.mark.parametrize("path", PATHS)
def test_tensors_may_lie_in_any_way(path):
    """Heads first, heads that share memory, one token or head with an odd stride, a beginning between 16-byte pieces."""
    runs(path, 64)
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


@pytest.mark.parametrize("blocks", [1, 3, 132])
@pytest.mark.parametrize("head_dim", hopper.HEAD_DIMS)
def test_hopper_blocks_work_through_many_tiles(head_dim, blocks, monkeypatch):
    """Long and short sequences, spans, windows, and stretches whose queries see nothing, in hundreds of works."""
    runs("hopper", head_dim)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: blocks)
    generator = np.random.default_rng(blocks)
    lengths = [1, 900, 130, 2000, 64, 1, 1777, 128]
    cu = [0, *accumulate(lengths)]
    bounds = []
    for length in lengths:
        edges = sorted({int(edge) for edge in generator.integers(0, length + 1, 8)})
        window = 300 if length == 2000 else None
        low, reach = visible_keys(length, list(zip(edges[::2], edges[1::2], strict=False)), window=window)
        reach[length // 3 : length // 2] = -1
        bounds.append((low, reach))
    low, reach = (torch.from_numpy(np.concatenate(each)).cuda() for each in zip(*bounds, strict=True))
    q, k, v = (torch.randn(cu[-1], heads, head_dim, device="cuda").bfloat16() for heads in (12, 4, 4))
    wanted = attention(q, k, v, cu, cu, low=low, reach=reach, path="tensor-core")
    pages, table = put_in_pages(generator, k, v, cu, int(generator.choice(PAGE_SIZES)))
    torch.empty_like(q).fill_(torch.nan)
    for out in (
        attention(q, k, v, cu, cu, low=low, reach=reach, path="hopper"),
        run_paged(pages, table, q, cu, cu, low, reach, path="hopper"),
    ):
        assert (out.float() - wanted.float()).norm() <= 2**-7 * wanted.float().norm()
        assert not out[reach < 0].any()


def test_launches_on_two_streams_do_not_share_their_work():
    runs("hopper", 64)
    q, k, v = (torch.randn(6000, heads, 64, device="cuda").bfloat16() for heads in (16, 4, 4))
    wanted = attention(q, k, v, [0, 6000], [0, 6000], path="hopper")
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outs = []
    for turn in range(20):
        with torch.cuda.stream(streams[turn % 2]):
            outs.append(attention(q, k, v, [0, 6000], [0, 6000], path="hopper"))
    torch.cuda.synchronize()
    assert all(torch.equal(out, wanted) for out in outs)


def test_a_path_that_cannot_is_refused_by_name():
    case = make_case(0, [(3, 3)], head_dim=72, dtype=torch.float32).to("cuda")
    with pytest.raises(ValueError, match=r"path='tensor-core' does not compute torch.float32, head_dim=72"):
        attention(*case.args, path="tensor-core")
    with pytest.raises(ValueError, match="path='fast' does not compute"):
        attention(*case.args, path="fast")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_another_sequences_nan_stays_there(head_dim, path):
    """Tiles reach past the end of a sequence, where the next one's keys lie."""
    runs(path, head_dim)
    lengths = [0, 70, 200, 450]
    q, k, v = (torch.randn(450, 2, head_dim, device="cuda").half() for _ in range(3))
    clean = attention(q, k, v, lengths, lengths, path=path)
    for x in (q, k, v):
        x[70:200] = torch.nan
    spoilt = attention(q, k, v, lengths, lengths, path=path)
    assert torch.equal(spoilt[:70], clean[:70])
    assert torch.equal(spoilt[200:], clean[200:])
    assert spoilt[70:200].isnan().all()


def test_hopper_repeats_itself_bit_for_bit():
    """Warps wait for each other at barriers: a place where one does not would show as another result now and then."""
    runs("hopper", 128)
    generator = np.random.default_rng(0)
    for head_dim in hopper.HEAD_DIMS:
        q, k, v = (torch.randn(3000, heads, head_dim, device="cuda").bfloat16() for heads in (8, 2, 2))
        low, reach = visible_keys(3000, [(100, 700), (1000, 1001), (1500, 2800)])
        bounds = {"low": torch.from_numpy(low).cuda(), "reach": torch.from_numpy(reach).cuda()}
        first = attention(q, k, v, [0, 3000], [0, 3000], **bounds, path="hopper")
        for _ in range(int(generator.integers(60, 80))):
            torch.empty_like(q).fill_(torch.nan)
            assert torch.equal(first, attention(q, k, v, [0, 3000], [0, 3000], **bounds, path="hopper"))


def test_calls_are_captured_in_a_graph():
    """Splice with a plan, a decode step and a prefill: replayed, they see what has been written into their inputs since."""
    table = torch.randn(100, 256, device="cuda").bfloat16()
    items = [torch.randn(5, 256, device="cuda").bfloat16(), torch.randn(3, 256, device="cuda")]
    ranges = [(2, 7), (9, 12)]
    ids = torch.randint(100, (20,), device="cuda")
    plan = SplicePlan(items, ranges, table, 20)
    generator = np.random.default_rng(1)
    lengths = np.array([300, 40])
    k, v = (torch.randn(340, 2, 64, device="cuda").bfloat16() for _ in range(2))
    pages, block_table = put_in_pages(generator, k, v, [0, 300, 340], 16)
    paged = PagedPlan(block_table, [0, 1, 2], lengths, pages, 4)
    q = torch.randn(2, 4, 64, device="cuda").bfloat16()
    low = torch.zeros(2, dtype=torch.int32, device="cuda")
    reach = torch.tensor([299, 39], dtype=torch.int32, device="cuda")

    prompt = torch.randn(3000, 24, 64, device="cuda").bfloat16()  # queries, keys and values side by side
    causal = dict(zip(("low", "reach"), (torch.from_numpy(each).cuda() for each in visible_keys(3000)), strict=True))

    def prefill():
        return attention(prompt[:, :16], prompt[:, 16:20], prompt[:, 20:], [0, 3000], [0, 3000], **causal)

    def all_three():
        decoded = paged_attention(q, pages, LAYER, paged, low=low, reach=reach)
        return splice(ids, table, plan=plan, scale=2.0), decoded, prefill()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        all_three()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state, seen, read = all_three()
    tensor_core._device_tiles.cache_clear()  # as many other shapes would; what the graph reads must stay
    for _ in range(3):
        torch.full((64,), -1, dtype=torch.int32, device="cuda")
    for seed in range(3):
        torch.manual_seed(seed)
        ids.copy_(torch.randint(100, (20,)))
        q.normal_()
        prompt.normal_()
        for item in items:
            item.normal_()
        graph.replay()
        assert torch.equal(state, splice(ids, table, items, ranges, scale=2.0))
        assert torch.equal(seen, paged_attention(q, pages, LAYER, paged, low=low, reach=reach))
        assert seen.isfinite().all()
        assert seen.any()
        assert torch.equal(read, prefill())


def test_kernels_come_from_disk_the_second_time(tmp_path, monkeypatch):
    monkeypatch.setenv("RANGE_KERNELS_CACHE", str(tmp_path))
    source = wide.source("float16", False)
    first = Kernel(source, 0)
    again = Kernel(source, 0)
    assert not first.cached
    assert again.cached
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-100])  # cut short
    mended = Kernel(source, 0)
    assert not mended.cached
    assert Kernel(source, 0).cached
    (tmp_path / "file").touch()
    monkeypatch.setenv("RANGE_KERNELS_CACHE", str(tmp_path / "file" / "below"))
    assert not Kernel(source, 0).cached  # nowhere to keep it


@pytest.mark.parametrize("scale", [1.0, 3.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splice_casts_and_scales_as_torch_does(dtype, scale):
    """Items of every dtype in one launch, wide and in words."""
    for hidden in (64, 576, 70):
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


def test_ids_that_do_not_lie_end_to_end():
    table = torch.randn(50, 64, device="cuda").half()
    ids = torch.randint(50, (20, 3), device="cuda")
    assert torch.equal(splice(ids[:, 1], table), table[ids[:, 1]])
    assert torch.equal(splice(ids.flatten()[::4], table), table[ids.flatten()[::4]])


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 64, 65, 1023, 1024, 1025, 1057, 3000])
def test_splice_finds_a_token_s_range_among_many(count):
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


def test_splice_reads_items_where_they_lie():
    """Views with gaps between rows, chunks, and rows that begin between 16-byte pieces."""
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
