"""Every PTX kernel compiles without a GPU, for sm_80, sm_90a or both, and keeps its accumulators in registers."""

from __future__ import annotations

import re
from itertools import product

import pytest
from numba.cuda import types
from range_kernels.cuda import decode_split_kv, layer_ops, prefill_sm80, prefill_sm90, row_products, splice
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
    except Exception as error:  # the CUDA packages raise different exceptions if a part is missing
        pytest.skip(f"no NVVM and nvJitLink to compile with: {type(error).__name__}")


def check(source, capabilities=(AMPERE, HOPPER), spills=0):
    """Compile and link for each capability; returns the PTX of the last one."""
    assert source.smem_bytes < 227 * 1024  # shared memory limit of a block on sm_90
    for capability in capabilities:
        compiled = source.compile(capability)
        (code, log), ptx = compiled.machine_code(), compiled.ptx()
        assert ".f64" not in ptx  # Numba turns address arithmetic of mixed signedness into float64
        assert code.startswith(b"\x7fELF")
        assert "wgmma" not in log, log  # "serialized": a register is accessed during an asynchronous product
        assert int(re.search(r"Used (\d+) registers", log)[1]) <= 255
        spilled = int(re.search(r"(\d+) bytes spill stores", log)[1])
        assert spilled <= spills, f"{spilled} bytes spilled: some accumulators are in local memory"
    return ptx


KINDS = [("bfloat16", False, False), ("bfloat16", True, True), ("float16", False, True)]


GEFORCE, AMPERE_100, HOPPER_100 = 99 << 10, 163 << 10, 227 << 10  # shared memory limits of a block, in bytes


@pytest.mark.parametrize(("dtype", "softcap", "paged"), KINDS)
@pytest.mark.parametrize("head_dim", prefill_sm80.HEAD_DIMS)
def test_prefill_compiles_to_tensor_core_instructions(head_dim, dtype, softcap, paged):
    capabilities = [AMPERE, HOPPER] if dtype == "bfloat16" else [AMPERE]
    for capability in capabilities:
        shape = prefill_sm80.choose_shape(head_dim, AMPERE_100 if capability == AMPERE else HOPPER_100)
        ptx = check(prefill_sm80.source(head_dim, shape, dtype, softcap, paged), [capability], spills=256)
    assert "mma.sync.aligned.m16n8k16" in ptx


def test_tile_shapes_and_stages_fit_the_shared_memory():
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


# The other sizes differ from these only in numbers: one kind of each is enough.
HOPPER_KINDS = [(size, *kind) for size in (64, 128, 256) for kind in KINDS] + [(80, *KINDS[0]), (96, *KINDS[-1])]


def test_every_hopper_size_is_compiled():
    assert {size for size, *_ in HOPPER_KINDS} == set(prefill_sm90.HEAD_DIMS)


@pytest.mark.parametrize(("head_dim", "dtype", "softcap", "paged"), HOPPER_KINDS)
def test_hopper_prefill_compiles_to_the_expected_wgmma_instructions(head_dim, dtype, softcap, paged):
    # Three consumer warpgroups leave the producer 32 registers per thread: values needed once per work tile spill.
    ptx = check(prefill_sm90.source(head_dim, dtype, softcap, paged), [HOPPER], spills=64)
    keys = keys_of(head_dim)
    products = [f"m64n{keys}k16"] * (2 * head_dim // 16) + [f"m64n{head_dim}k16"] * (2 * keys // 16)
    assert sorted(re.findall(r"wgmma.mma_async.sync.aligned.(m64n\d+k16)", ptx)) == sorted(products)


@pytest.mark.parametrize(("dtype", "softcap", "capability"), [("bfloat16", False, HOPPER), ("float16", True, AMPERE)])
@pytest.mark.parametrize("head_dim", prefill_sm80.HEAD_DIMS)
def test_decode_compiles_to_tensor_core_instructions(head_dim, dtype, softcap, capability):
    alone = decode_split_kv.choose_stages(head_dim, 1, 1, HOPPER_100 if capability == HOPPER else AMPERE_100)
    ptx = check(decode_split_kv.source(head_dim, dtype, softcap, alone), [capability])
    assert "mma.sync.aligned.m16n8k16" in ptx


@pytest.mark.parametrize("converts", [False, True])
@pytest.mark.parametrize("dtype", splice.DTYPES.values())
def test_wide_splice_compiles_to_16_byte_loads(dtype, converts):
    ptx = check(splice.source(dtype, converts))
    # Two loads in flight in the main loop, and a single load for the remainder.
    assert ptx.count("ld.global.nc.L1::no_allocate.v4.b32") >= 3


LAYER_OPS = [
    *(row_products.row_product_source(dtype, rows) for dtype in ("bfloat16", "float16") for rows in (1, 2)),
    *(
        layer_ops.norm_source(*kind)
        for kind in product(("bfloat16", "float32"), ("bfloat16", "float32"), (False, True))
    ),
    *(layer_ops.gate_source(*kind) for kind in product(("bfloat16", "float16"), (False, True))),
    *(
        layer_ops.rotate_source(*kind)
        for kind in product(("bfloat16", "float16"), ("float32",), (False, True), (False, True))
    ),
]


@pytest.mark.parametrize("source", LAYER_OPS, ids=lambda source: source.name)
def test_layer_operations_compile(source):
    ptx = check(source)
    if not source.name.startswith("rotate"):
        assert "ld.global.v4.b32" in ptx


def test_source_names_are_unique_per_kernel_variant():
    """The name is the key of the disk cache: two kernels with the same name would be confused with each other."""
    both = [("bfloat16", "float16"), (False, True)]
    shapes = [prefill_sm80.Shape(128, 2), prefill_sm80.Shape(64, 2), prefill_sm80.Shape(64, 1)]
    sources = [
        *(prefill_sm80.source(*kind) for kind in product(prefill_sm80.HEAD_DIMS, shapes, *both, (False, True))),
        *(prefill_sm90.source(*kind) for kind in product(prefill_sm90.HEAD_DIMS, *both, (False, True))),
        *(decode_split_kv.source(*kind) for kind in product(prefill_sm80.HEAD_DIMS, *both, (2, 3, 5))),
        *(splice.source(*kind) for kind in product(splice.DTYPES.values(), (False, True))),
        *LAYER_OPS,
    ]
    assert len({source.name for source in sources}) == len(sources)
