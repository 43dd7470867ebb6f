"""Graphs, streams and the cache of compiled kernels, on a GPU: `make test-gpu`."""

import numpy as np
import torch
from range_kernels import PagedPlan, SplicePlan, attention, paged_attention, splice, visible_keys
from range_kernels.cuda import splice as wide
from range_kernels.cuda import tiles
from range_kernels.cuda.kernel import Kernel

from .cases import make_case
from .gpu_calls import NEEDS_GPU
from .paging import LAYER, put_in_pages

pytestmark = NEEDS_GPU


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
    tiles._planned.cache_clear()  # as many other shapes would; what the graph reads must stay
    spoilt = [torch.full((64,), -1, dtype=torch.int32, device="cuda") for _ in range(20)]  # would take its place
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
    del spoilt


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
