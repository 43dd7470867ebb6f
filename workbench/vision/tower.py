"""Only the vision part of a vision-language model: its tower and projector, without the language model's weights.

The model is built with a language part of no layers and one token, so that Transformers' own code computes the features; of the
checkpoint only the other tensors are read.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from ..memory import PeakMemory, in_words
from ..models import Model
from ..quiet import quiet_transformers
from .checkpoint import INDEX, SINGLE, Checkpoint
from .families import Family, Features, family_of, run_tower
from .images import Picture, open_image
from .processors import load_processor
from .remote_code import python_files, refuse_remote_code
from .sources import FolderSource, HttpSource, Source, open_source

_LANGUAGE = re.compile(r"^(model\.)*(language_model|text_model|llm|layers|embed_tokens|norm)\.|^(\w+\.)*lm_head\.")
_BIN = "pytorch_model.bin"
_SMALL_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class LoadReport:
    """What loading a tower took.

    Attributes:
        tensors, tensor_bytes: of the vision part.
        bytes_read: of weight files, headers and index included.
        bytes_skipped: of weight files, never read.
        peak_bytes: memory above what the process held before.
    """

    tensors: int
    tensor_bytes: int
    bytes_read: int
    bytes_skipped: int
    peak_bytes: int

    def __str__(self) -> str:
        share = self.bytes_read / max(1, self.bytes_read + self.bytes_skipped)
        return (
            f"read {in_words(self.bytes_read)} for {self.tensors} vision tensors of {in_words(self.tensor_bytes)}, skipped "
            f"{in_words(self.bytes_skipped)} ({share:.1%} of the checkpoint read); peak memory {in_words(self.peak_bytes)}"
        )


class VisionTower:
    """Tower and projector of one model: pictures in, rows for the language model out.

    Attributes:
        config: the whole model's configuration.
        network: Transformers' model, its language part empty.
        report: what loading took.
        weights_digest: SHA-256 of the vision weights' bytes as stored, for caches.
    """

    def __init__(
        self, name: str, config: Any, network: Any, folder: Path, report: LoadReport, digest: str, trusted: bool
    ) -> None:
        self.name, self.config, self.network, self.report, self.weights_digest = name, config, network, report, digest
        parameter = next(network.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        self.processor = load_processor(folder, config, trusted)
        self.family: Family | None = None if trusted else family_of(config, self.processor.tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all, besides the pictures, that decides their features: weights, processor, dtype, versions."""
        import transformers

        parts = {
            "weights": self.weights_digest,
            "processor": self.processor.settings,
            "dtype": str(self.dtype),
            "model_type": self.config.model_type,
            "vision": _plain(getattr(self.config, "vision_config", None) or self.config.audio_config),
            "transformers": transformers.__version__,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @torch.no_grad()
    def features(self, items: Sequence[Picture | Any]) -> list[Features]:
        """The features of pictures (or sounds) that stand in one prompt.

        Args:
            items: pictures (PIL or paths); for audio models waveforms, mono float arrays at the model's sampling rate.

        Returns:
            one `Features` an item, rows on the CPU in the tower's dtype.

        Raises:
            ImageError: a picture that cannot be used, by name.
        """
        if not items:
            return []
        processed = self.process(items)
        output = self.run(processed)
        if self.family is None:
            pooled = getattr(output, "pooler_output", output)
            return [Features(rows.reshape(-1, rows.shape[-1]).cpu()) for rows in pooled]
        found = self.family.split(output, processed, len(items))
        return [
            Features(each.rows.cpu(), each.grid, None if each.deepstack is None else each.deepstack.cpu(), each.tiles)
            for each in found
        ]

    def process(self, items: Sequence[Picture | Any]) -> dict[str, Any]:
        """What the model's own processor makes of the items: pixel values and what goes with them."""
        if self.family is not None and self.family.modality == "audio":
            return self.processor.audio(items)
        return self.processor.images([open_image(item) for item in items])

    @torch.no_grad()
    def run(self, processed: dict[str, Any]) -> Any:
        """Processed inputs through tower and projector."""
        given = {name: self._moved(value) for name, value in processed.items()}
        return self.family.run(self.network, given) if self.family else run_tower(self.network, "image", given)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    @torch.no_grad()
    def check_parity(self, items: Sequence[Picture | Any], full: Any = None) -> float:
        """The largest difference between these features and the full model's, which is 0.0 where all is well.

        Args:
            full: the full model's network, for one that is open already; else it is loaded, language weights and all.
        """
        if full is None:
            full = load_full(self.config, self._folder(), self.dtype).to(self.device)
        mine = self.features(items)
        whole = copy.copy(self)
        whole.network = full
        theirs = whole.features(items)
        return max(float((a.rows.double() - b.rows.double()).abs().max()) for a, b in zip(mine, theirs, strict=True))

    def _folder(self) -> str:
        if not Path(self.name).exists() and not Path(self.config.name_or_path).exists():
            raise ModelError(f"the full model of {self.name!r} is not on this machine: pass it as full=")
        return self.config.name_or_path if Path(self.config.name_or_path).exists() else self.name


def load_vision_tower(
    model: Model | str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> VisionTower:
    """Load only the vision tower and projector of a model.

    Args:
        model: from `load_model`, a folder, the http(s) address of a folder, or a Hugging Face id, of which only the vision
            tensors' bytes are fetched.
        dtype: to compute in.
        trust_remote_code: run Python files that come with the model; `ModelError` names them where they are needed.

    Raises:
        ModelError: a checkpoint that is damaged or lacks vision tensors, by file and tensor; a server without range requests.
    """
    location = str(model.path) if isinstance(model, Model) else str(model)
    trusted = trust_remote_code or (isinstance(model, Model) and model.trust_remote_code)
    name = model.name if isinstance(model, Model) else location
    source = open_source(location)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _small_files(source, Path(scratch))
        config = _configuration(folder, name, trusted)
        weights_start = source.bytes_read
        with PeakMemory() as peak:
            tensors, total, digest = _vision_tensors(source, config)
            network = _build(config, folder, tensors, getattr(torch, str(dtype).removeprefix("torch.")), trusted)
            network = network.to(device).eval()
        read = source.bytes_read - weights_start
        size = sum(tensor.nbytes for tensor in tensors.values())
        report = LoadReport(len(tensors), size, read, max(0, total - read), peak.bytes)
        config.name_or_path = location
        own = trusted and getattr(config, "auto_map", None) is not None
        return VisionTower(name, config, network, folder, report, digest, own)


def load_full(config: Any, folder: str | Path, dtype: torch.dtype) -> Any:
    """The whole model, language weights and all."""
    with quiet_transformers():
        return model_class(config).from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()


def model_class(config: Any) -> Any:
    """Transformers' class for a configuration that names it."""
    import transformers

    names = getattr(config, "architectures", None) or []
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise ModelError(f"Transformers {transformers.__version__} has no class {names}: is the model newer than it?")


def _plain(config: Any) -> dict[str, Any]:
    """A configuration without what names where it came from."""
    return {key: value for key, value in config.to_dict().items() if not key.startswith(("_", "transformers_version"))}


def _small_files(source: Source, scratch: Path) -> Path:
    """A local folder with configuration, processor and tokenizer."""
    if isinstance(source, FolderSource):
        return source.folder
    for name in _SMALL_FILES:
        if source.exists(name):
            (scratch / name).write_bytes(source.read(name, 0, source.size(name)))
    if not (scratch / "config.json").exists():
        raise ModelError(f"{source.where('config.json')} does not exist: the address must be of a model folder")
    return scratch


def _configuration(folder: Path, name: str, trusted: bool) -> Any:
    from transformers import AutoConfig

    if not trusted:
        refuse_remote_code(folder, name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # Transformers and its validators raise many kinds for a damaged folder
        raise ModelError(f"the configuration of {name!r} cannot be read: {error}") from error
    if getattr(config, "vision_config", None) is None and getattr(config, "audio_config", None) is None:
        raise ModelError(f"{name!r} ({config.model_type}) has no vision or audio part: it is a language model")
    return config


def _vision_tensors(source: Source, config: Any) -> tuple[dict[str, torch.Tensor], int, str]:
    """Every tensor that is not the language model's, the bytes of all weight files, and a digest of what was read."""
    if not source.exists(INDEX) and not source.exists(SINGLE) and source.exists(_BIN):
        tensors, total = _unpickled(source)
    else:
        checkpoint = Checkpoint(source)
        names = [name for name in checkpoint if not _LANGUAGE.search(name)]
        if not names:
            raise ModelError(f"{source.where('')} holds no vision tensors, only a language model's")
        tensors, total = checkpoint.read(names), checkpoint.total_bytes()
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        sha.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return tensors, total, sha.hexdigest()


def _unpickled(source: Source) -> tuple[dict[str, torch.Tensor], int]:
    """A `.bin` checkpoint: memory-mapped, tensors only; never any code that a pickle may carry."""
    if isinstance(source, HttpSource):
        raise ModelError(
            f"{source.where(_BIN)} is a pickle, which cannot be read in parts: download and convert it first"
        )
    size = source.size(_BIN)
    try:
        every = torch.load(source.where(_BIN), map_location="cpu", weights_only=True, mmap=True)
        tensors = {name: value.clone() for name, value in every.items() if not _LANGUAGE.search(name)}
    except Exception as error:  # pickle and zip readers raise many kinds
        raise ModelError(
            f"{source.where(_BIN)} is not a plain file of tensors ({type(error).__name__}: {str(error).splitlines()[0]}). Files "
            "that need weights_only=False can run any code and are not loaded: convert it to safetensors where you trust it"
        ) from error
    source.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
    return tensors, size


def _build(config: Any, folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype, trusted: bool) -> Any:
    """Transformers' model around the tensors, with a language part of no layers and one token."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    empty: dict[str, Any] = {
        "num_hidden_layers": 0,
        "vocab_size": 1,
        "pad_token_id": None,
        "layer_types": [],
        "vocab_size_per_layer_input": 1,
    }
    for key, value in empty.items():
        if hasattr(text, key):
            setattr(text, key, value)
    small.tie_word_embeddings = False
    try:
        built = _class_of(small, folder, trusted)
        with quiet_transformers(reports=False):  # it would report the language weights as missing
            network, loaded = built.from_pretrained(
                None,
                config=small,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"the vision part of {config.model_type!r} cannot be built: {error}") from error
    missing = [name for name in loaded["missing_keys"] if not _LANGUAGE.search(name)]
    wrong = [str(entry) for entry in loaded["mismatched_keys"] if not _LANGUAGE.search(str(entry[0]))]
    if missing or wrong:
        raise ModelError(
            f"the checkpoint lacks {len(missing)} vision tensors, and {len(wrong)} have another shape than the configuration "
            f"says: {', '.join([*sorted(missing), *wrong][:3])}. Fetch the checkpoint again"
        )
    return network


def _class_of(config: Any, folder: Path, trusted: bool) -> Any:
    if trusted and getattr(config, "auto_map", None):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        entry = next((config.auto_map[key] for key in config.auto_map if key.startswith("AutoModel")), None)
        if entry is None:
            raise ModelError(
                f"{folder}/config.json has an auto_map without a model class; its files are {python_files(folder)}"
            )
        return get_class_from_dynamic_module(entry, folder)
    return model_class(config)
