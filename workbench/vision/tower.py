"""Load only the vision (or audio) tower and projector of a multimodal model, without its language weights.

Transformers' own code computes the features; of the checkpoint, only the tensors of that part are read
(`tower_weights.py`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from ..models import Model, load_model
from ..models.model import BUILT_IN
from ..models.options import parse_device, parse_dtype
from ..models.sources import open_source
from ..prompt import Prompt
from .architectures import Family, Features, family_of, is_known, run_tower
from .class_prompt import class_prompt, process_items
from .images import ImageLike, open_image
from .messages import Item
from .own_processor import OwnProcessor
from .peak_memory import PeakMemory, in_words
from .processors import Processor
from .tower_weights import build_network, load_full, plain_settings, read_configuration, small_files, vision_tensors

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadReport:
    """The cost of loading a tower.

    Attributes:
        tensors, tensor_bytes: number and bytes of the vision tensors.
        bytes_read: bytes read from weight files, including headers and index.
        bytes_skipped: bytes of weight files that were not read.
        peak_bytes: peak resident memory while loading, minus the process's memory before.
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
    """Tower and projector of one model: `features` turns images (or sounds) into rows for the language model.

    Attributes:
        location: the folder or address that it was read from.
        config: the whole model's configuration.
        network: Transformers' model, whose language part has no layers.
        processor: the model's preprocessing and tokenizer.
        report: the cost of loading it.
        weights_digest: SHA-256 of the names, dtypes, shapes and bytes of the vision tensors as stored, for cache keys.
        dtype, device: of the network's parameters.
        family: how the architecture lays out images; None for a model whose own processor does that (an `OwnProcessor`), and
            for one with its own Python code.
    """

    def __init__(
        self,
        location: str,
        config: Any,
        network: Any,
        processor: Processor | OwnProcessor,
        report: LoadReport,
        digest: str,
    ) -> None:
        self.location, self.config, self.network, self.processor = location, config, network, processor
        self.report, self.weights_digest = report, digest
        parameter = next(network.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        own = isinstance(processor, OwnProcessor) or getattr(config, "auto_map", None) is not None
        self.family: Family | None = None if own else family_of(config, processor.tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything except the images that determines their features: weights, processor, dtype, versions."""
        import transformers

        parts = {
            "weights": self.weights_digest,
            "processor": self.processor.settings,
            "dtype": str(self.dtype),
            # Feature layers, projector, rows per image and scale factors are outside the vision part of the configuration.
            "config": {key: value for key, value in plain_settings(self.config).items() if key != "text_config"},
            "transformers": transformers.__version__,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @torch.no_grad()
    def features(self, items: Sequence[ImageLike | Any]) -> list[Features]:
        """Compute the features of the images (or sounds) of one prompt.

        Args:
            items: images (PIL or paths); for audio models WAV files or waveforms, mono float arrays at the model's
                sampling rate.

        Returns:
            one `Features` per item, with rows on the CPU in the tower's dtype.

        Raises:
            ImageError, AudioError: an item cannot be used; the message names it.
            PromptError: the model's processor rejects the images.
        """
        if not items:
            return []
        if isinstance(self.processor, OwnProcessor):
            return self._own_features(items)
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

    @cached_property
    def own_processor(self) -> OwnProcessor:
        """The model's own processor of text, images, videos and sounds, which lays out whole prompts.

        Raises:
            ModelError: the processor cannot be read, or the checkpoint is not on this machine.
        """
        if isinstance(self.processor, OwnProcessor):
            return self.processor
        if not Path(self.location).is_dir():
            raise ModelError(f"the processor for videos is not on this machine but at {self.location}: fetch the model")
        return OwnProcessor(Path(self.location), self.config, self.processor.trusted)

    def _own_features(self, items: Sequence[Any]) -> list[Features]:
        """Features by the class's own forward pass, of a prompt of nothing but the items."""
        markers = self.own_processor.markers
        named = [item if isinstance(item, Item) else Item(next(iter(markers)), item) for item in items]
        text = self.own_processor.text_of([item.modality for item in named])
        prompt = self.prompt(process_items(self.own_processor, text, named), named)
        labels = [span.label.split(",")[0] for span in prompt.spans]
        found = []
        for label in dict.fromkeys(labels):
            parts = [number for number, each in enumerate(labels) if each == label]
            rows = torch.cat([prompt.input_embeddings[part] for part in parts])
            deep = [prompt.deepstack[part] for part in parts] if prompt.deepstack else []
            grid = prompt.spans[parts[0]].grid if len(parts) == 1 else None
            found.append(Features(rows, grid, torch.cat(deep, dim=1) if deep else None))
        return found

    def prompt(self, processed: dict[str, Any], items: Sequence[Item]) -> Prompt:
        """Return the Prompt of `process_items`' output, with rows, ranges, positions and spans as the class itself computes them.

        Raises:
            PromptError: the class rejects the inputs.
            ModelError: it does something that a Prompt cannot express.
        """
        return class_prompt(self.network, self.own_processor, processed, items, self._moved)

    def process(self, items: Sequence[ImageLike | Any]) -> dict[str, Any]:
        """Return the inputs of `run`, by the model's own processor; raises the errors of `features`."""
        assert isinstance(self.processor, Processor)
        if self.family is None:
            return self.processor.images([open_image(item) for item in items])
        if self.family.modality == "audio":
            return self.processor.audio(items)
        images = [open_image(item) for item in items]
        return self.processor.images(images, nested=self.family.nested, **self.family.reader_options)

    @torch.no_grad()
    def run(self, processed: dict[str, Any]) -> Any:
        """Run the inputs of `process` through tower and projector; return their output, which `Family.split` takes."""
        given = {name: self._moved(value) for name, value in processed.items()}
        return self.family.run(self.network, given) if self.family else run_tower(self.network, "image", given)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    @torch.no_grad()
    def check_parity(self, items: Sequence[ImageLike | Any], full: Any = None) -> float:
        """Return the largest absolute difference between these features and the full model's; 0.0 is expected.

        Args:
            items: as in `features`.
            full: the full model's network, if it is already open; else it is loaded here, with its language weights.

        Raises:
            ModelError: `full` is needed, because the checkpoint is not on this machine.
        """
        if full is None:
            if not Path(self.location).is_dir():
                raise ModelError(
                    f"the full model is not on this machine but at {self.location}: open it and pass it as full="
                )
            full = load_full(self.config, self.location, self.dtype).to(self.device)
        mine = self.features(items)
        whole = copy.copy(self)
        whole.network = full
        theirs = whole.features(items)
        return max(float((a.rows.double() - b.rows.double()).abs().max()) for a, b in zip(mine, theirs, strict=True))


def load_vision_tower(
    model: Model | str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> VisionTower:
    """Load only the vision tower and projector of a model.

    Args:
        model: from `load_model`, a built-in name, a folder, the http(s) address of a folder, or a Hugging Face id; only the vision
            tensors' bytes are fetched.
        dtype: the dtype to compute in.
        trust_remote_code: run Python files that come with the model; `ModelError` names them if they are needed.

    Raises:
        ValueError: `dtype` is not float32, bfloat16 or float16.
        ModelError: the device does not exist, the checkpoint is damaged or has no vision tensors (the message names
            file and tensor), or the server does not support range requests.
    """
    if str(model) in BUILT_IN:
        model = load_model(str(model))
    location = str(model.path) if isinstance(model, Model) else str(model)
    trusted = trust_remote_code or (isinstance(model, Model) and model.trust_remote_code)
    name = model.name if isinstance(model, Model) else location
    torch_dtype, torch_device = parse_dtype(dtype, DTYPES, "vision"), parse_device(device, "vision")
    source = open_source(location)
    with tempfile.TemporaryDirectory() as scratch:
        folder = small_files(source, Path(scratch))
        config = read_configuration(folder, name, trusted)
        weights_start = source.bytes_read
        with PeakMemory() as peak:
            tensors, total, digest = vision_tensors(source)
            network = build_network(config, folder, tensors, torch_dtype, trusted)
            network = network.to(torch_device).eval()
        read = source.bytes_read - weights_start
        size = sum(tensor.nbytes for tensor in tensors.values())
        report = LoadReport(len(tensors), size, read, max(0, total - read), peak.bytes)
        own = not is_known(config) and getattr(config, "auto_map", None) is None
        processor = (OwnProcessor if own else Processor)(folder, config, trusted)
        return VisionTower(location, config, network, processor, report, digest)
