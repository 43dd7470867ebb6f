"""Every tensor-core kernel compiles without a GPU, for sm_80 and sm_90a, and keeps its sums in registers."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from numba import cuda
from numba.cuda import types
from range_kernels.cuda import decode, splice
from range_kernels.cuda.tensor_core import HEAD_DIMS, THREADS, make_kernel, signature


@pytest.fixture(scope="module", autouse=True)
def compiler():
    def nothing(x):
        x[0] = 1.0

    try:
        to_ptx(nothing, types.void(types.float32[::1]), (8, 0))
    except Exception as error:  # the CUDA packages raise many kinds where a part is missing
        pytest.skip(f"no NVVM and NVRTC to compile with: {type(error).__name__}")


def to_ptx(function, kinds, capability, **options):
    return cuda.compile(function, kinds, cc=capability, device=False, abi="numba", output="ptx", **options)[0]


def assemble(ptx, architecture, folder):
    """What ptxas says: registers a thread, and bytes spilled."""
    if shutil.which("ptxas") is None:
        return None
    (folder / "kernel.ptx").write_text(ptx)
    command = ["ptxas", "-v", f"-arch={architecture}", str(folder / "kernel.ptx"), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(re.search(r"Used (\d+) registers", done.stderr)[1]), int(
        re.search(r"(\d+) bytes spill stores", done.stderr)[1]
    )


KINDS = [("bfloat16", False, False), ("bfloat16", True, True), ("float16", False, True)]


@pytest.mark.parametrize(("dtype", "softcap", "paged"), KINDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_prefill(head_dim, dtype, softcap, paged, tmp_path):
    function, _, room = make_kernel(head_dim, dtype, softcap, paged)
    assert room < 227 * 1024  # what an SM of sm_90 gives a block
    for capability, architecture in (((8, 0), "sm_80"), ((9, 0, "a"), "sm_90a")):
        ptx = to_ptx(function, signature(), capability, launch_bounds=(THREADS, 2 if head_dim <= 128 else 1))
        assert "mma.sync.aligned.m16n8k16" in ptx
        assert ".f64" not in ptx  # addresses of mixed signs become float64 in Numba
        used = assemble(ptx, architecture, tmp_path)
        if used:
            registers, spilled = used
            assert registers <= 255
            assert spilled <= 256, f"{spilled} bytes spilled: some sums lie in memory"


@pytest.mark.parametrize(("dtype", "softcap"), [("bfloat16", False), ("float16", True)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode(head_dim, dtype, softcap, tmp_path):
    function, room = decode.make_kernel(head_dim, dtype, softcap)
    assert room < 227 * 1024
    for capability, architecture in (((8, 0), "sm_80"), ((9, 0, "a"), "sm_90a")):
        ptx = to_ptx(function, decode.signature(), capability, launch_bounds=(THREADS, 2 if head_dim <= 128 else 1))
        assert "mma.sync.aligned.m16n8k16" in ptx
        assert ".f64" not in ptx
        used = assemble(ptx, architecture, tmp_path)
        if used:
            assert used[1] == 0


def test_wide_splice(tmp_path):
    number, unsigned = types.int64, types.uint64
    kinds = types.void(*[number] * 7, unsigned, number)
    for capability, architecture in (((8, 0), "sm_80"), ((9, 0, "a"), "sm_90a")):
        ptx = to_ptx(splice._copy_wide.py_func, kinds, capability)
        assert ptx.count("ld.global.nc.L1::no_allocate.v4.b32") == 5  # four pieces at once, and one by one
        assert ".f64" not in ptx
        used = assemble(ptx, architecture, tmp_path)
        if used:
            assert used[1] == 0
