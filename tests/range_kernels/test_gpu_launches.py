"""CUDA graphs, streams and the cache of compiled kernels; needs a GPU: `make test-gpu`."""

import numpy as np
import pytest
import torch
from range_kernels import (
    CUDAGraphPlan,
    KVPages,
    PagedPlan,
    SplicePlan,
    attention,
    paged_attention,
    splice,
    visible_keys,
)
from range_kernels.cuda import splice as cuda_splice
from range_kernels.cuda import tile_plan
from range_kernels.cuda.compiled_kernel import Kernel

from tests.range_kernels.cases import make_case
from tests.range_kernels.gpu_calls import NEEDS_GPU
from tests.range_kernels.paging import LAYER, put_in_pages

pytestmark = NEEDS_GPU


def test_replayed_calls_read_updated_inputs():
    """A captured splice, decode step and prefill read the current contents of their input tensors on each replay."""
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
    key_start = torch.zeros(2, dtype=torch.int32, device="cuda")
    key_stop = torch.tensor([300, 40], dtype=torch.int32, device="cuda")

    prompt = torch.randn(3000, 24, 64, device="cuda").bfloat16()  # queries, keys and values in one tensor
    causal = dict(
        zip(("key_start", "key_stop"), (torch.from_numpy(each).cuda() for each in visible_keys(3000)), strict=True)
    )

    def prefill():
        return attention(prompt[:, :16], prompt[:, 16:20], prompt[:, 20:], [0, 3000], [0, 3000], **causal)

    def all_three():
        decoded = paged_attention(q, pages, LAYER, paged, key_start=key_start, key_stop=key_stop)
        return splice(ids, table, plan=plan, scale=2.0), decoded, prefill()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        all_three()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state, seen, read = all_three()
    tile_plan._planned.cache_clear()  # as many other shapes would do; what the graph reads must stay allocated
    spoilt = [torch.full((64,), -1, dtype=torch.int32, device="cuda") for _ in range(20)]  # would reuse its memory
    for seed in range(3):
        torch.manual_seed(seed)
        ids.copy_(torch.randint(100, (20,)))
        q.normal_()
        prompt.normal_()
        for item in items:
            item.normal_()
        graph.replay()
        assert torch.equal(state, splice(ids, table, items, ranges, scale=2.0))
        assert torch.equal(seen, paged_attention(q, pages, LAYER, paged, key_start=key_start, key_stop=key_stop))
        assert seen.isfinite().all()
        assert seen.any()
        assert torch.equal(read, prefill())
    del spoilt


def test_captured_decode_step_follows_its_graph_plan():
    """Results equal those of separate plans while lengths cross page and split boundaries and batch sizes vary."""
    generator = np.random.default_rng(3)
    pages = KVPages(2, 256, 16, 2, 64, torch.bfloat16, "cuda")
    pages.keys.normal_()
    pages.values.normal_()
    graph_plan = CUDAGraphPlan(4, 64, 64, pages, 8)
    q, k, v = (torch.zeros(4, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (8, 2, 2))
    key_start, key_stop = (torch.zeros(4, dtype=torch.int32, device="cuda") for _ in range(2))

    def call(plan, count):
        given = (q[:count], pages, LAYER, plan)
        return paged_attention(
            *given, new=(k[:count], v[:count]), key_start=key_start[:count], key_stop=key_stop[:count]
        )

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(graph_plan, 4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = call(graph_plan, 4)
    for lengths in ([5], [700, 33, 16, 17], [701, 34, 17, 18], [1024], [64, 1], [1000, 1000, 1000, 1000]):
        count = len(lengths)
        plan = PagedPlan(generator.permutation(256).reshape(4, 64)[:count], range(count + 1), lengths, pages, 8)
        for x in (q, k, v):
            x.normal_()
        key_start[:count] = torch.tensor([max(length - 900, 0) for length in lengths])
        key_stop[:count] = torch.tensor(lengths)
        before = pages.keys.clone(), pages.values.clone()
        expected = call(plan, count)
        after = pages.keys.clone(), pages.values.clone()
        pages.keys, pages.values = (into.copy_(x) for into, x in zip((pages.keys, pages.values), before, strict=True))
        graph_plan.copy_from(plan)
        graph.replay()
        assert torch.equal(seen[:count], expected)
        assert torch.equal(pages.keys, after[0])
        assert torch.equal(pages.values, after[1])


def test_graph_plan_refuses_steps_beyond_its_capacity():
    pages = KVPages(1, 64, 16, 2, 64, torch.bfloat16, "cuda")
    graph_plan = CUDAGraphPlan(2, 8, 2, pages, 4)
    table = np.arange(64, dtype=np.int32).reshape(4, 16)
    q = torch.zeros(2, 4, 64, dtype=torch.bfloat16, device="cuda")

    def step(lengths, most_pages, queries=1):
        count = len(lengths)
        return PagedPlan(table[:count, :most_pages], np.arange(count + 1) * queries, lengths, pages, 4)

    graph_plan.copy_from(step([128, 5], 8))
    for refused in (step([5, 5, 5], 8), step([5], 9), step([9], 8, queries=2)):
        with pytest.raises(ValueError, match=r"this plan takes at most \(2, 8, 2\) and one query each"):
            graph_plan.copy_from(refused)
    with pytest.raises(ValueError, match="give key_start and key_stop"):
        paged_attention(q, pages, 0, graph_plan)
    bounds = {
        "key_start": torch.zeros(2, dtype=torch.int32, device="cuda"),
        "key_stop": torch.zeros(2, dtype=torch.int32, device="cuda"),
    }
    for wrong in ({"path": "plain"}, {"scale": -1.0}):
        with pytest.raises(ValueError, match="for the tensor-core path"):
            paged_attention(q, pages, 0, graph_plan, **bounds, **wrong)
    larger = KVPages(1, 32, 32, 2, 64, torch.bfloat16, "cuda")
    with pytest.raises(ValueError, match=r"pages of \(tokens, KV heads\) \(32, 2\): this plan is for \(16, 2\)"):
        paged_attention(q, larger, 0, graph_plan, **bounds)
    with pytest.raises(ValueError, match=r"\(32, 2\): this plan is for \(16, 2\)"):
        graph_plan.copy_from(PagedPlan(table[:1, :8] % 32, [0, 1], [9], larger, 4))
    with pytest.raises(ValueError, match="8 query heads over pages on the GPU: this plan is for 4"):
        graph_plan.copy_from(PagedPlan(table[:1, :8], [0, 1], [9], pages, 8))
    with pytest.raises(ValueError, match="at most 16 query heads per KV head"):
        CUDAGraphPlan(2, 8, 2, pages, 34)


def test_compiled_kernels_are_loaded_from_the_disk_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANGE_KERNELS_CACHE", str(tmp_path))
    source = cuda_splice.source("float16", False)
    first = Kernel(source, 0)
    again = Kernel(source, 0)
    assert not first.cached
    assert again.cached
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-100])  # truncated
    recompiled = Kernel(source, 0)
    assert not recompiled.cached
    assert Kernel(source, 0).cached
    (tmp_path / "file").touch()
    monkeypatch.setenv("RANGE_KERNELS_CACHE", str(tmp_path / "file" / "below"))
    assert not Kernel(source, 0).cached  # the cache folder cannot be created


def test_kernels_run_on_the_current_pytorch_stream():
    """The result is the same if a slow producer is still running on the current stream."""
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
