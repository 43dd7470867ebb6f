"""A compiled kernel: read from the cache on disk, or compiled and stored there; loaded and launched through the driver.

    name, this package's sources, versions, architecture -> digest -> <cache>/<digest>.cubin -> the driver -> launch

Numba takes seconds per kernel, and its own cache does not support kernels that are built by functions. All arguments are numbers
and addresses, so the driver is called directly: Numba's launch was about half of a call's host time (`kernels/NOTES.md`).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import threading
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
_CTYPES = {
    "uint64": ctypes.c_uint64,
    "int64": ctypes.c_int64,
    "uint32": ctypes.c_uint32,
    "int32": ctypes.c_int32,
    "float32": ctypes.c_float,
}


def cache_folder() -> Path:
    """Return the folder of compiled kernels: `RANGE_KERNELS_CACHE`, else `range_kernels` in the user's cache folder."""
    given = os.environ.get("RANGE_KERNELS_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "range_kernels"


@dataclass(frozen=True)
class Source:
    """The Python function of a kernel and everything that is needed to compile it.

    Attributes:
        name: contains every parameter that `make` depends on; part of the cache key.
        make: builds the Python function; called only if the kernel is not in the cache.
        signature: the Numba signature, which returns void and takes only numbers.
        threads: threads per block; blocks: resident blocks per multiprocessor, which bounds the registers.
        smem_bytes: dynamic shared memory.
    """

    name: str
    make: Callable[[], Callable[..., None]]
    signature: Any
    threads: int
    blocks: int = 1
    smem_bytes: int = 0

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

    Compiled to PTX and assembled by the driver, the Hopper prefill ran at 402 TFLOP/s instead of 588.
    """

    name: str
    capability: Capability
    ltoir: bytes

    def machine_code(self) -> tuple[bytes, str]:
        """Return the cubin, and what ptxas reports about registers and spills."""
        return self._link("cubin", ptxas_options=["-v"])

    def ptx(self) -> str:
        """Return the PTX that the cubin is assembled from."""
        return self._link("ptx", ptx=True)[0].decode()

    def _link(self, output: str, **options: Any) -> tuple[bytes, str]:
        from cuda.core import Linker, LinkerOptions, ObjectCode

        arch = f"sm_{''.join(map(str, self.capability))}"
        code = ObjectCode.from_ltoir(self.ltoir, name=self.name)
        linker = Linker(code, options=LinkerOptions(arch=arch, link_time_optimization=True, **options))
        linked = bytes(linker.link(output).code)
        return linked, linker.get_info_log()


class Kernel:
    """A kernel loaded on one device, from the cache on disk; if it is not there, it is compiled (seconds) and stored.

    Args:
        source: the kernel.
        device: index of the GPU.

    Attributes:
        cached: whether it was read from disk.

    Raises:
        RuntimeError: the driver rejected the kernel; the message contains the driver's error.
    """

    def __init__(self, source: Source, device: int) -> None:
        started = time.perf_counter()
        self.source = source
        # One slot per argument, and an array of their addresses: the driver's bindings take much longer to pack a tuple.
        self._slots: list[Any] = [_CTYPES[str(kind)]() for kind in source.signature.args]
        self._addresses = (ctypes.c_void_p * len(self._slots))(*[ctypes.addressof(slot) for slot in self._slots])
        self._arguments = ctypes.addressof(self._addresses)
        self._lock = threading.Lock()
        major, minor = torch.cuda.get_device_capability(device)
        capability: Any = (major, minor, "a") if major >= 9 else (major, minor)
        path = cache_folder() / f"{_digest(source, capability)}.cubin"
        torch.cuda.init()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # the context is current from here on
            cached = _read_cache(path)
            self.cached = cached is not None
            cubin = source.compile(capability).machine_code()[0] if cached is None else cached
            self._load(cubin, device)
            if cached is None:
                _write_cache(path, cubin)
        self.seconds = time.perf_counter() - started
        """Seconds to get the kernel, including compilation if `cached` is False."""
        loaded.append(self)

    def _load(self, cubin: bytes, device: int) -> None:
        driver = _driver()
        hint = "; if the driver is older than CUDA 13, update it or install the toolkit packages of its version"
        self._library = _check(driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0), self.source.name, hint)
        (kernel,) = _check(driver.cuLibraryEnumerateKernels(1, self._library), self.source.name)
        if self.source.smem_bytes > 48 * 1024:  # more must be requested
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            what = f"{self.source.name} with {self.source.smem_bytes} bytes of shared memory per block"
            _check(
                driver.cuKernelSetAttribute(attribute, self.source.smem_bytes, kernel, driver.CUdevice(device)), what
            )
        self._function, self._launch = driver.CUfunction(int(kernel)), driver.cuLaunchKernel

    def launch(
        self, grid: tuple[int, int], tensor: torch.Tensor, *arguments: float, threads: int | None = None
    ) -> None:
        """Launch `grid` (x, y) blocks on PyTorch's current stream of the tensor's device, without waiting for them.

        Args:
            arguments: numbers and addresses, as in the signature.
            threads: threads per block, if fewer than the kernel was compiled for.

        Raises:
            RuntimeError: the driver refused the launch.
        """
        # PyTorch's default stream refers to the current device.
        device = tensor.device.index or 0
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.launch(grid, tensor, *arguments, threads=threads)
            return
        stream = torch._C._cuda_getCurrentRawStream(device)  # torch.cuda.current_stream takes ten times as long
        block = threads or self.source.threads
        with self._lock:  # the driver reads the arguments before it returns
            for slot, value in zip(self._slots, arguments, strict=True):
                slot.value = value
            (status,) = self._launch(
                self._function, grid[0], grid[1], 1, block, 1, 1, self.source.smem_bytes, stream, self._arguments, 0
            )
        if int(status):
            raise RuntimeError(f"{self.source.name}: the driver refused the launch of {grid} blocks: {status.name}")


loaded: list[Kernel] = []
"""Every kernel that this process has loaded, in order, with the seconds that it took; the benchmarks report them."""


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _check(result: tuple[Any, ...], what: str, hint: str = "") -> Any:
    status, *rest = result
    if int(status):
        raise RuntimeError(f"the driver rejected {what}: {status.name}{hint}")
    return rest[0] if rest else None


def _digest(source: Source, capability: tuple[Any, ...]) -> str:
    key = f"{source.name} {source.signature} {source.threads} {source.blocks} {capability} {_versions()} {_sources()}"
    return hashlib.sha256(key.encode()).hexdigest()[:32]


@cache
def _versions() -> str:
    """Return the versions of all packages that compile and link, and of the driver."""
    driver = _check(_driver().cuDriverGetVersion(), "the query of its version")
    parts = ["numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings", "nvidia-nvvm", "nvidia-nvjitlink"]
    return f"{' '.join(f'{name} {_version(name)}' for name in parts)} driver {driver}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # the toolkit may not come from Python packages
        return "unknown"


@cache
def _sources() -> str:
    """Return a digest of the files that kernels are built from: a change in any of them recompiles every kernel."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _read_cache(path: Path) -> bytes | None:
    """Return the cached code, or None if it is missing or its SHA-256 is wrong (the driver does not check it)."""
    try:
        digest, code = path.read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    return code if hashlib.sha256(code).hexdigest().encode() == digest else None


def _write_cache(path: Path, code: bytes) -> None:
    """Write a file atomically. Errors are ignored: without the file, the kernel is only compiled again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(hashlib.sha256(code).hexdigest().encode() + b"\n" + code)
                file.flush()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
    except OSError:
        pass
