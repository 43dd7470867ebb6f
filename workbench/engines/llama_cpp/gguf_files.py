"""GGUF files of a checkpoint's language model, for llama.cpp; quantised ones with a checkpoint of what their weights mean."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file

from ...errors import ModelError
from ...models import Model, load_model
from ...models.cache import cached_folder
from ...models.extract_language_model import copy_tokenizer, extract_language_model

Weights = Literal["f32", "bf16", "q8_0", "q4_0"]
WEIGHTS: tuple[Weights, ...] = ("f32", "bf16", "q8_0", "q4_0")
# Architectures whose tensors are copied one to one, by their name in llama.cpp; of the first, queries and keys rotate other pairs.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_PAIRS = ("llama",)


def gguf_of(model: Model, weights: Weights) -> tuple[Path, Model]:
    """Return a GGUF file of a model's language part, written on first use and cached, and the model that it computes.

    The second is the language part itself, or for quantised weights a checkpoint with the values that they stand for: an engine that
    runs the file is compared with those, so that only its arithmetic is judged.

    Raises:
        ModelError: an architecture or a setting that is not written here.
    """
    if weights not in WEIGHTS:
        raise ModelError(f"weights={weights!r}: choose one of {', '.join(WEIGHTS)}")
    source = {"model": model.digest, "weights": weights, "format": "1"}
    name = f"{Path(model.name).name}-{weights}-gguf"
    folder = cached_folder(name, lambda made: _write(model, weights, made), source)
    return folder / "model.gguf", load_model(folder)


def _write(model: Model, weights: Weights, made: Path) -> None:
    import gguf

    language = load_model(extract_language_model(model))
    config = language.config
    architecture = _architecture(language)
    made.mkdir()
    writer = gguf.GGUFWriter(made / "model.gguf", architecture)
    _write_settings(writer, config, weights)
    kind = gguf.GGMLQuantizationType[weights.upper()]
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture), config.num_hidden_layers
    )
    tied = "lm_head.weight" not in set(language.weights)
    values: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(language):
        base, _, ending = name.rpartition(".")
        target = names.get_name(base)
        if target is None:
            raise ModelError(f"tensor {name} of {model.name!r} has no place in a GGUF file of {architecture!r}")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            base.rpartition(".")[2]
        )
        moved = _pairs(tensor, heads) if architecture in _PAIRS and heads else tensor
        if tensor.ndim == 2:
            if weights in ("q8_0", "q4_0") and moved.shape[-1] % 32:
                raise ModelError(
                    f"{name} is {moved.shape[-1]} wide and {weights} has blocks of 32: choose weights='f32' or 'bf16'"
                )
            data = gguf.quants.quantize(moved.numpy(), kind)
            writer.add_tensor(f"{target}.{ending}", data, raw_dtype=kind)
            meant = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(data, kind)))
            values[name] = _unpaired(meant, heads) if architecture in _PAIRS and heads else meant
        else:
            writer.add_tensor(f"{target}.{ending}", moved.numpy())
            values[name] = tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _write_checkpoint(language, values, made, tied)


def _architecture(language: Model) -> str:
    config = language.config
    found = _ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"{config.model_type!r} is not written as GGUF here; {', '.join(_ARCHITECTURES)} are. Convert it with llama.cpp's own script"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ModelError(f"rope_type={rope['rope_type']!r} of {language.name!r} is not written as GGUF here")
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if windows or (config.model_type == "mistral" and getattr(config, "sliding_window", None)):
        raise ModelError(f"{language.name!r} has layers with a sliding window, which are not written as GGUF here")
    if config.vocab_size < 32:
        raise ModelError(f"a vocabulary of {config.vocab_size} is too small for llama.cpp")
    return found


def _write_settings(writer: Any, config: Any, weights: Weights) -> None:
    import gguf

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")  # ids in, ids out
    kinds = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[weights]])


def _tensors(language: Model) -> Iterator[tuple[str, torch.Tensor]]:
    for name in sorted(language.weights):
        if not name.endswith("rotary_emb.inv_freq"):
            yield name, language.weights.get(name).float().contiguous()


def _pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in the order of llama.cpp's rotation, which turns neighbours, where Transformers turns the two halves."""
    half = len(tensor) // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape).contiguous()


def _unpaired(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    half = len(tensor) // heads // 2
    return tensor.reshape(heads, half, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape).contiguous()


def _write_checkpoint(language: Model, values: dict[str, torch.Tensor], made: Path, tied: bool) -> None:
    config = language.config.to_dict() | {"dtype": "float32", "tie_word_embeddings": tied}
    (made / "config.json").write_text(json.dumps(config, indent=1, default=str))
    save_file(values, made / "model.safetensors", {"format": "pt"})
    copy_tokenizer(language, made)
