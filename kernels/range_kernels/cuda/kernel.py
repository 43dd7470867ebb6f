"""A compiled kernel: from the cache on disk, or made and put there; loaded and launched by the driver.

    name, this package's sources, versions, architecture -> digest -> <cache>/<digest>.cubin -> the driver -> launch

Numba takes seconds for a kernel, and its own cache cannot hold kernels that are made by functions. All arguments are numbers and
addresses, so the driver is called directly: Numba's launch was about half of what a call cost the host (`kernels/NOTES.md`).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from numba import cuda

Capability = tuple[int, int] | tuple[int, int, str]
_KINDS = {
    "uint64": ctypes.c_uint64,
    "int64": ctypes.c_int64,
    "uint32": ctypes.c_uint32,
    "int32": ctypes.c_int32,
    "float32": ctypes.c_float,
}


def cache_folder() -> Path:
    """Where compiled kernels are kept: `RANGE_KERNELS_CACHE`, else `range_kernels` in the user's cache folder."""
    given = os.environ.get("RANGE_KERNELS_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "range_kernels"


@dataclass(frozen=True)
class Source:
    """What a kernel is made from.

    Attributes:
        name: says all that `make` depends on; part of the cache's key.
        make: builds the Python function; called only where the cache has no such kernel.
        signature: Numba's, returning void, of numbers only.
        threads: a block; blocks: of them a multiprocessor shall hold, which bounds the registers.
        room: bytes of dynamic shared memory.
    """

    name: str
    make: Callable[[], Callable[..., None]]
    signature: Any
    threads: int
    blocks: int = 1
    room: int = 0

    def compile(self, capability: Capability) -> Linkable:
        """Compile for a compute capability, such as `(8, 0)` or `(9, 0, "a")`; needs no GPU."""
        compile: Any = cuda.compile
        bounds = (self.threads, self.blocks)
        code, _ = compile(
            self.make(), self.signature, cc=capability, device=False, abi="numba", output="ltoir", launch_bounds=bounds
        )
        return Linkable(self.name, capability, code)


@dataclass(frozen=True)
class Linkable:
    """A kernel in NVVM's LTO-IR, which is optimised when it is linked.

    From PTX that the driver assembled the Hopper prefill ran at 402 TFLOP/s instead of 588.
    """

    name: str
    capability: Capability
    ltoir: bytes

    def machine_code(self) -> tuple[bytes, str]:
        """A cubin, and what ptxas says of registers and spills."""
        return self._link("cubin", ptxas_options=["-v"])

    def ptx(self) -> str:
        """The PTX that the cubin is assembled from."""
        return self._link("ptx", ptx=True)[0].decode()

    def _link(self, output: str, **options: Any) -> tuple[bytes, str]:
        from cuda.core import Linker, LinkerOptions, ObjectCode

        arch = f"sm_{''.join(map(str, self.capability))}"
        code = ObjectCode.from_ltoir(self.ltoir, name=self.name)
        linker = Linker(code, options=LinkerOptions(arch=arch, link_time_optimization=True, **options))
        linked = bytes(linker.link(output).code)
        return linked, linker.get_info_log()


class Kernel:
    """A kernel on one device.

    Raises:
        RuntimeError: the driver does not take it; says what the driver said.
    """

    def __init__(self, source: Source, device: int) -> None:
        began = time.perf_counter()
        self.source = source
        self._kinds = tuple(_KINDS[str(kind)] for kind in source.signature.args)
        major, minor = torch.cuda.get_device_capability(device)
        capability: Any = (major, minor, "a") if major >= 9 else (major, minor)
        place = cache_folder() / f"{_digest(source, capability)}.cubin"
        torch.cuda.init()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # the context is current from here on
            kept = _kept(place)
            self.cached = kept is not None
            cubin = source.compile(capability).machine_code()[0] if kept is None else kept
            self._load(cubin, device)
            if kept is None:
                _keep(place, cubin)
        self.seconds = time.perf_counter() - began
        """What it took to get the kernel, compiling included where `cached` is False."""
        loaded.append(self)

    def _load(self, cubin: bytes, device: int) -> None:
        driver = _driver()
        hint = "; if the driver is older than CUDA 13, update it or install the toolkit packages of its version"
        self._library = _done(driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0), self.source.name, hint)
        (kernel,) = _done(driver.cuLibraryEnumerateKernels(1, self._library), self.source.name)
        if self.source.room > 48 * 1024:  # more must be asked for
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            what = f"{self.source.name} with {self.source.room} bytes of shared memory a block"
            _done(driver.cuKernelSetAttribute(most, self.source.room, kernel, driver.CUdevice(device)), what)
        self._function, self._launch = driver.CUfunction(int(kernel)), driver.cuLaunchKernel

    def launch(
        self, grid: tuple[int, int], tensor: torch.Tensor, *arguments: float, threads: int | None = None
    ) -> None:
        """Run `grid` blocks on PyTorch's current stream of the tensor's device; `arguments` as the signature has them.

        `threads`, where fewer than the kernel was made for shall do, are those of a block.
        """
        # PyTorch's default stream is that of whichever device is current.
        if tensor.device.index not in (None, torch.cuda.current_device()):
            with torch.cuda.device(tensor.device):
                self.launch(grid, tensor, *arguments, threads=threads)
            return
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        values = (arguments, self._kinds)
        block = threads or self.source.threads
        (status,) = self._launch(self._function, grid[0], grid[1], 1, block, 1, 1, self.source.room, stream, values, 0)
        if int(status):
            raise RuntimeError(f"{self.source.name}: the driver refused the launch of {grid} blocks: {status.name}")


loaded: list[Kernel] = []
"""Every kernel of this process, in the order of first use: for benchmarks that show what first calls cost."""


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _done(answer: tuple[Any, ...], what: str, hint: str = "") -> Any:
    status, *rest = answer
    if int(status):
        raise RuntimeError(f"the driver does not take {what}: {status.name}{hint}")
    return rest[0] if rest else None


def _digest(source: Source, capability: tuple[Any, ...]) -> str:
    said = f"{source.name} {source.signature} {source.threads} {source.blocks} {capability} {_versions()} {_sources()}"
    return hashlib.sha256(said.encode()).hexdigest()[:32]


@cache
def _versions() -> str:
    """Versions of everything that compiles and links, and of the driver."""
    driver = _done(_driver().cuDriverGetVersion(), "a question for its version")
    parts = ["numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings", "nvidia-nvvm", "nvidia-nvjitlink"]
    return f"{' '.join(f'{name} {_version(name)}' for name in parts)} driver {driver}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # the toolkit may come from elsewhere
        return "unknown"


@cache
def _sources() -> str:
    """Digest of the files that kernels are made from: a change in any of them makes every kernel anew."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _kept(place: Path) -> bytes | None:
    """What the cache holds, None where it holds nothing or something damaged: the driver does not look for that."""
    try:
        digest, code = place.read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    return code if hashlib.sha256(code).hexdigest().encode() == digest else None


def _keep(place: Path, code: bytes) -> None:
    """Write a file whole or not at all; a cache that cannot be written costs time, and nothing else."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
            try:
                file.write(hashlib.sha256(code).hexdigest().encode() + b"\n" + code)
                file.flush()
                os.replace(file.name, place)
            except OSError:
                os.unlink(file.name)
    except OSError:
        pass
