"""The parts of a tower: configuration, only the vision tensors, and Transformers' network around them.

The network has a language part with no layers and a vocabulary of one, so that Transformers' own code computes the features.
"""

from __future__ import annotations

import copy
import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, foreign_errors, reason
from ..models.checkpoint import INDEX, SINGLE, Checkpoint
from ..models.http_source import HttpSource
from ..models.remote_code import python_files, refuse_remote_code
from ..models.sizes import check_part
from ..models.sources import FolderSource, Source
from ..models.transformers_logging import silenced_transformers

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


def is_language(name: str) -> bool:
    """Whether the name of a checkpoint's tensor is one of the language model."""
    return bool(_LANGUAGE.search(name))


def load_full(config: Any, folder: str | Path, dtype: torch.dtype) -> Any:
    """Return Transformers' whole model from a local folder, with its language weights, in evaluation mode."""
    with silenced_transformers():
        return model_class(config).from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()


def model_class(config: Any) -> Any:
    """Return the Transformers class that a configuration names in `architectures`.

    Raises:
        ModelError: it names none, or none that this version of Transformers has.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    if not names:
        raise ModelError(
            f"the configuration of {config.model_type!r} names no architectures: add the class to config.json"
        )
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise ModelError(f"Transformers {transformers.__version__} has no class {names}: is the model newer than it?")


def plain_settings(config: Any) -> dict[str, Any]:
    """Return a configuration as a dict without private fields, the model's path and Transformers' version."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if not key.startswith(("_", "name_or_path", "transformers_version"))
    }


def small_files(source: Source, scratch: Path) -> Path:
    """Return a local folder with configuration, processor and tokenizer; remote files are copied into `scratch`.

    Raises:
        ModelError: the source has no config.json.
    """
    if isinstance(source, FolderSource):
        return source.folder
    for name in _SMALL_FILES:
        if source.exists(name) and source.size(name):
            (scratch / name).write_bytes(source.read(name, 0, source.size(name)))
    if not (scratch / "config.json").exists():
        raise ModelError(f"{source.where('config.json')} does not exist: the address must be that of a model folder")
    return scratch


def read_configuration(folder: Path, name: str, trusted: bool) -> Any:
    """Return the model's configuration; `name` is used in messages.

    Raises:
        ModelError: it cannot be read, needs Python code that is not `trusted`, or has no vision or audio part.
    """
    from transformers import AutoConfig

    if not trusted:
        refuse_remote_code(folder, name)
    with foreign_errors(ModelError, f"the configuration of {name!r} cannot be read", "Correct or fetch config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    if not _takes_media(config):
        raise ModelError(f"{name!r} ({config.model_type}) has no vision or audio part: it is a language model")
    if config.is_encoder_decoder or getattr(config.get_text_config(), "is_encoder_decoder", False):
        raise ModelError(
            f"{name!r} ({config.model_type}) is an encoder-decoder: its images go into the encoder, which its decoder attends to, so no rows "
            "take the place of tokens. Run its images with 'transformers-multimodal'"
        )
    return config


def _takes_media(config: Any) -> bool:
    """Whether a model takes images, video or sound: it has a part for them, or its class does that without a part of its own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    named = {"vision_config", "audio_config", *(getattr(config, "sub_configs", None) or {})} - {"text_config"}
    parts = [part for part in named if hasattr(config, part)]
    return any(getattr(config, part) is not None for part in parts) or (not parts and config.model_type in NAMES)


def vision_tensors(source: Source) -> tuple[dict[str, torch.Tensor], int, str]:
    """Read all tensors of a checkpoint except those of the language model.

    Returns:
        the tensors by name; the size of all weight files in bytes; SHA-256 of the names, dtypes, shapes and bytes of
        the tensors.

    Raises:
        ModelError: the checkpoint is damaged, or contains a language model only.
    """
    if not source.exists(INDEX) and not source.exists(SINGLE) and source.exists(_BIN):
        tensors, total = _unpickled(source)
    else:
        checkpoint = Checkpoint(source)
        names = [name for name in checkpoint if not is_language(name)]
        if not names:
            raise ModelError(f"{source.where('')} contains no vision tensors, only a language model's")
        tensors, total = checkpoint.read(names), checkpoint.total_bytes()
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        sha.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return tensors, total, sha.hexdigest()


def _unpickled(source: Source) -> tuple[dict[str, torch.Tensor], int]:
    """Return the vision tensors of a `.bin` checkpoint, and its size; code in the pickle is never run."""
    if isinstance(source, HttpSource):
        raise ModelError(
            f"{source.where(_BIN)} is a pickle, which cannot be read in parts: download and convert it first"
        )
    size = source.size(_BIN)
    try:
        every = torch.load(source.where(_BIN), map_location="cpu", weights_only=True, mmap=True)
        tensors = {name: value.clone() for name, value in every.items() if not is_language(name)}
    except Exception as error:  # pickle and zip readers raise many error types
        raise ModelError(
            f"{source.where(_BIN)} is not a plain file of tensors ({type(error).__name__}: {str(error).splitlines()[0]}). Files "
            "that need weights_only=False can run any code and are not loaded: convert it to safetensors if you trust it"
        ) from error
    source.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
    return tensors, size


def build_network(
    config: Any, folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype, trusted: bool
) -> Any:
    """Return Transformers' model with the given vision tensors and a language part without layers.

    Raises:
        ModelError: the model cannot be built, or vision tensors are missing or have another shape than the
            configuration requires.
    """
    for part in ("vision_config", "audio_config"):
        if hasattr(getattr(config, part, None), "to_dict"):
            check_part(getattr(config, part), {key: value.shape for key, value in tensors.items()}, config.model_type)
    small = copy.deepcopy(config)
    text = small.get_text_config()
    empty: dict[str, Any] = {
        "num_hidden_layers": 0,
        "vocab_size": 1,
        # Some classes put the padding token in place of images before they look ids up; some refuse None.
        "pad_token_id": 0,
        "layer_types": [],
        "vocab_size_per_layer_input": 1,
    }
    kinds = getattr(text, "layer_types", None)
    for key, value in empty.items():
        if hasattr(text, key):
            setattr(text, key, value)
    small.tie_word_embeddings = False
    try:
        built = _class_of(small, folder, trusted)
        # A model's own Python code may have towers only, and loading some such classes asks the network for more files.
        if built.forward is torch.nn.Module.forward and not getattr(config, "auto_map", None):
            raise ModelError(
                f"{built.__name__} has no forward pass of its own, only its parts have: rows cannot be injected. Save the "
                "part that takes images or sounds as a checkpoint of its own"
            )
        with silenced_transformers(reports=False):  # it would report the language weights as missing
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
        raise ModelError(f"the vision part of {config.model_type!r} cannot be built: {reason(error)}") from error
    missing = [name for name in loaded["missing_keys"] if not is_language(name)]
    mismatched = sorted(entry for entry in loaded["mismatched_keys"] if not is_language(str(entry[0])))
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if mismatched and all(vocabulary in entry[1] and 1 in entry[2] for entry in mismatched):
        raise ModelError(
            f"{type(network).__name__} has its vocabulary ({mismatched[0][0]}) outside a language model of its own: rows "
            "cannot be injected. Run its images with 'transformers-multimodal'"
        )
    wrong = [str(entry) for entry in mismatched]
    if missing or wrong:
        raise ModelError(
            f"the checkpoint lacks {len(missing)} vision tensors, and {len(wrong)} have another shape than in the "
            f"configuration: {', '.join([*sorted(missing), *wrong][:3])}. Fetch the checkpoint again"
        )
    if kinds is not None:  # the class makes a mask for each kind of layer
        network.config.get_text_config().layer_types = kinds
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
