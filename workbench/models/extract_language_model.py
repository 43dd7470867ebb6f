"""Extract the language part of a vision-language model as a separate checkpoint, for text-only engines that take embeddings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import ModelError
from .cache import cached_folder
from .model import Model

_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
)
_SHARD = 4 << 30


def extract_language_model(model: Model) -> Path:
    """Return a folder with the model's text configuration, tokenizer and language weights, written on first use and cached.

    Weights are copied in shards of up to 4 GiB, which is also the memory needed; values and dtype are unchanged. For a text-only
    model, the model's own folder is returned.

    Raises:
        ModelError: the language part is not a known causal language model, or its weights have unknown names.
    """
    if model.config is model.text_config:
        return model.path
    name = f"{Path(model.name).name}-language"
    return cached_folder(name, lambda made: _write(model, made), source={"model": model.digest})


def _write(model: Model, made: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = model.text_config.to_dict()
    kind = config.get("model_type")
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if architecture is None:
        raise ModelError(
            f"the language part of {model.name!r}, {kind!r}, is not a causal language model that Transformers knows"
        )
    config["architectures"] = [architecture]
    config["tie_word_embeddings"] = bool(
        getattr(model.config, "tie_word_embeddings", config.get("tie_word_embeddings"))
    )
    renamed = {name: new for name in model.weights if (new := _language_name(name)) is not None}
    if not any(new.endswith("embed_tokens.weight") for new in renamed.values()):
        raise ModelError(
            f"no language weights found in {model.path}: its tensors are named {next(iter(model.weights), 'nothing')!r}, ..."
        )
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config, indent=1))
    copy_tokenizer(model, made)
    _write_weights(model, renamed, made)


def copy_tokenizer(model: Model, folder: Path) -> None:
    """Copy a model's tokenizer, chat template and generation settings into another folder."""
    for pattern in (
        "tokenizer*",
        "*.jinja",
        "special_tokens_map.json",
        "generation_config.json",
        "vocab.*",
        "merges.txt",
    ):
        for file in model.path.glob(pattern):
            shutil.copy(file, folder / file.name)


def _language_name(name: str) -> str | None:
    """Return the tensor's name in the language model; None for a tensor of another part."""
    for prefix, new in _PREFIXES:
        if name.startswith(prefix):
            return new + name.removeprefix(prefix)
    return name if name.startswith("lm_head.") else None


def _write_weights(model: Model, renamed: dict[str, str], made: Path) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    shard_of: dict[str, int] = {}
    shard_bytes = total = 0

    def flush() -> None:
        number = len(shards) - 1
        save_file(shards[-1], made / _shard_name(number), metadata={"format": "pt"})
        shards[-1] = {}

    for name, new in sorted(renamed.items()):
        tensor = model.weights.get(name)
        if shard_bytes and shard_bytes + tensor.nbytes > _SHARD:
            flush()
            shards.append({})
            shard_bytes = 0
        shards[-1][new] = tensor.contiguous()
        shard_of[new] = len(shards) - 1
        shard_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": {name: _shard_name(at) for name, at in shard_of.items()}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _shard_name(number: int) -> str:
    return f"model-{number:05d}.safetensors"
