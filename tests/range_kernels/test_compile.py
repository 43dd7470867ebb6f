"""Every kernel made of PTX compiles without a GPU, for sm_80 or sm_90a or both, and keeps its sums in registers."""

from __future__ import annotations

import re
from itertools import product

import pytest
from numba.cuda import types
from range_kernels.cuda import decode_split_kv, prefill_sm80, prefill_sm90, splice
from range_kernels.cuda.compiled_kernel import Source
from range_kernels.cuda.warpgroup_mma import keys_of

pytestmark = pytest.mark.slow

AMPERE, HOPPER = (8, 0), (9, 0, "a")


@pytest.fixture(scope="module", autouse=True)
def compiler():
    def nothing(address):
        pass

    try:
        Source("nothing", lambda: nothing, types.void(types.uint64), 32).compile(AMPERE).machine_code()
    except Exception as error:  # the CUDA packages raise many kinds where a part is missing
        pytest.skip(f"no NVVM and nvJitLink to compile with: {type(error).__name__}")


def check(source, capabilities=(AMPERE, HOPPER), spills=0):
    """Compile and link for each capability; the PTX of the last."""
    assert source.smem_bytes < 227 * 1024  # what an SM of sm_90 gives a block
    for capability in capabilities:
        compiled = source.compile(capability)
        (code, said), ptx = compiled.machine_code(), compiled.ptx()
        assert ".f64" not in ptx  # addresses of mixed signs become float64 in Numba
        assert code.startswith(b"\x7fELF")
        assert "wgmma" not in said, said  # "serialized": a register is touched while a product is under way
        assert int(re.search(r"Used (\d+) registers", said)[1]) <= 255
        spilled = int(re.search(r"(\d+) bytes spill stores", said)[1])
        assert spilled <= spills, f"{spilled} bytes spilled: some sums lie in memory"
    return ptx


KINDS = [("bfloat16", False, False), ("bfloat16", True, True), ("float16", False, True)]


GEFORCE, AMPERE_100, HOPPER_100 = 99 << 10, 163 << 10, 227 << 10  # bytes of shared memory that a block may have


@pytest.mark.parametrize(("dtype", "softcap", "paged"), KINDS)
@pytest.mark.parametrize("head_dim", prefill_sm80.HEAD_DIMS)
def test_prefill(head_dim, dtype, softcap, paged):
    capabilities = [AMPERE, HOPPER] if dtype == "bfloat16" else [AMPERE]
    for capability in capabilities:
        shape = prefill_sm80.choose_shape(head_dim, AMPERE_100 if capability == AMPERE else HOPPER_100)
        ptx = check(prefill_sm80.source(head_dim, shape, dtype, softcap, paged), [capability], spills=256)
    assert "mma.sync.aligned.m16n8k16" in ptx


def test_what_fits_a_gpu_s_shared_memory():
    shapes = {
        room: [prefill_sm80.choose_shape(dim, room) for dim in (64, 96, 128, 256)]
        for room in (GEFORCE, AMPERE_100, HOPPER_100)
    }
    whole, half = prefill_sm80.Shape(128, 2), prefill_sm80.Shape(64, 2)
    assert shapes == {
        GEFORCE: [whole, whole, half, None],
        AMPERE_100: [whole, whole, whole, prefill_sm80.Shape(64, 1)],
        HOPPER_100: [whole, whole, whole, half],
    }
    check(prefill_sm80.source(128, half, "bfloat16", False, True), [(8, 6)])
    for room, alone, many in ((GEFORCE, 2, 2), (AMPERE_100, 3, 3), (HOPPER_100, 5, 3)):
        assert decode_split_kv.choose_stages(128, 132, 132, room) == alone
        assert decode_split_kv.choose_stages(128, 133, 132, room) == many
    check(decode_split_kv.source(128, "float16", True, 2), [(8, 9)])


@pytest.mark.parametrize(("dtype", "softcap", "paged"), KINDS)
@pytest.mark.parametrize("head_dim", prefill_sm90.HEAD_DIMS)
def test_prefill_for_hopper(head_dim, dtype, softcap, paged):
    # Three computing warpgroups leave the one that copies 32 registers a thread: some of what it needs once a work is spilled.
    ptx = check(prefill_sm90.source(head_dim, dtype, softcap, paged), [HOPPER], spills=64)
    keys = keys_of(head_dim)
    products = [f"m64n{keys}k16"] * (2 * head_dim // 16) + [f"m64n{head_dim}k16"] * (2 * keys // 16)
    assert sorted(re.findall(r"wgmma.mma_async.sync.aligned.(m64n\d+k16)", ptx)) == sorted(products)


@pytest.mark.parametrize(("dtype", "softcap", "capability"), [("bfloat16", False, HOPPER), ("float16", True, AMPERE)])
@pytest.mark.parametrize("head_dim", prefill_sm80.HEAD_DIMS)
def test_decode(head_dim, dtype, softcap, capability):
    alone = decode_split_kv.choose_stages(head_dim, 1, 1, HOPPER_100 if capability == HOPPER else AMPERE_100)
    ptx = check(decode_split_kv.source(head_dim, dtype, softcap, alone), [capability])
    assert "mma.sync.aligned.m16n8k16" in ptx


@pytest.mark.parametrize("converts", [False, True])
@pytest.mark.parametrize("dtype", splice.DTYPES.values())
def test_wide_splice(dtype, converts):
    ptx = check(splice.source(dtype, converts))
    # Two pieces at once, and one alone.
    assert ptx.count("ld.global.nc.L1::no_allocate.v4.b32") >= 3


def test_a_source_says_all_that_its_kernel_depends_on():
    """Its name is the key of the cache on disk: two kernels of one name would be taken for each other."""
    both = [("bfloat16", "float16"), (False, True)]
    shapes = [prefill_sm80.Shape(128, 2), prefill_sm80.Shape(64, 2), prefill_sm80.Shape(64, 1)]
    sources = [
        *(prefill_sm80.source(*kind) for kind in product(prefill_sm80.HEAD_DIMS, shapes, *both, (False, True))),
        *(prefill_sm90.source(*kind) for kind in product(prefill_sm90.HEAD_DIMS, *both, (False, True))),
        *(decode_split_kv.source(*kind) for kind in product(prefill_sm80.HEAD_DIMS, *both, (2, 3, 5))),
        *(splice.source(*kind) for kind in product(splice.DTYPES.values(), (False, True))),
    ]
    assert len({source.name for source in sources}) == len(sources)
