"""Compare the sizes in a configuration with the checkpoint's tensors before memory is taken for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ModelError
from ..schema import shortened
from .checkpoint import Checkpoint

_TABLES = ("embed_tokens.weight", "tok_embeddings.weight")
IN_LAYER = re.compile(r"\.layers\.\d+\.")
"""Matches names of tensors inside a layer."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|h|resblocks)\.(\d+)\.")
_COUNTS = ("num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers", "n_layer")
_SIZES = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads",
    "num_heads", "vocab_size", "num_experts", "num_local_experts", "n_routed_experts", "embed_dim", "num_channels", "out_hidden_size",
    "d_model", "projection_dim",
)  # fmt: skip
_HARMLESS = 1 << 20
"""Up to this size a number that no tensor has is left to the checks that compare shapes; memory for it is small."""


def check_sizes(config: Any, checkpoint: Checkpoint, name: str) -> None:
    """Check a model's configuration against the tensors of its checkpoint.

    Args:
        config: Transformers' configuration of the whole model.
        name: the model's, for messages.

    Raises:
        ModelError: the number of layers is not that of the checkpoint, or a size is impossibly large; the message has both numbers.
    """
    shapes = {tensor: entry.shape for tensor, entry in checkpoint.entries(checkpoint).items()}
    check_part(config, shapes, name)
    _check_layers(config.get_text_config(), list(shapes), name)


def check_part(config: Any, shapes: Mapping[str, Sequence[int]], name: str) -> None:
    """Check the sizes in a configuration, of a model or of a part such as its vision tower, against the shapes of its tensors.

    Unlike `check_sizes`, it does not require that the number of layers is exactly that of the tensors.

    Args:
        config: Transformers' configuration of the model or part.
        shapes: the tensors' shapes, by tensor name.
        name: of the model, for messages.

    Raises:
        ModelError: a size is impossibly large for these tensors; the message has both numbers.
    """
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    layers = {int(found) for tensor in shapes for found in _LAYER.findall(tensor)}
    _check_part(config.to_dict(), name, "", largest, len(layers))


def _check_layers(config: Any, tensors: list[str], name: str) -> None:
    """Compare the language model's number of layers with its tensors; extra ones that predict further tokens are allowed."""
    tables = [tensor for tensor in tensors if not IN_LAYER.search(tensor)]
    bases = [tensor.removesuffix(table) for table in _TABLES for tensor in tables if tensor.endswith(table)]
    wanted = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
    if len(bases) != 1 or wanted is None:
        return
    inside = re.compile(re.escape(bases[0]) + r"layers\.(\d+)\.")
    found = {int(match[1]) for tensor in tensors if (match := inside.match(tensor))}
    extra = getattr(config, "num_nextn_predict_layers", None) or 0
    blocks = getattr(config, "num_layers", None)  # LongCat counts two attention layers in each of these
    if found and max(found) + 1 not in (wanted, wanted + extra, blocks):
        raise ModelError(
            f"the configuration of {name!r} has {wanted} layers, but its checkpoint has {max(found) + 1}: correct num_hidden_layers in "
            "config.json, or fetch the checkpoint again"
        )


def _check_part(part: dict[str, Any], name: str, path: str, largest: int, layers: int) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and len(path) < 200:
            _check_part(value, name, f"{path}{key}.", largest, layers)
        elif isinstance(value, int) and key in _SIZES and value > max(largest, _HARMLESS):
            raise ModelError(
                f"{path}{key}={shortened(value)} in the configuration of {name!r}, but no dimension of a tensor in its checkpoint is "
                f"above {largest}: correct config.json, or fetch the checkpoint again"
            )
        elif isinstance(value, int) and key in _COUNTS and value > max(2 * layers, 1000):
            raise ModelError(
                f"{path}{key}={shortened(value)} in the configuration of {name!r}, but its checkpoint has {layers} numbered layers: "
                "correct config.json, or fetch the checkpoint again"
            )
    image, patch = part.get("image_size"), part.get("patch_size")
    image, patch = (max(size) if isinstance(size, list | tuple) and size else size for size in (image, patch))
    if (
        isinstance(image, int)
        and isinstance(patch, int)
        and patch > 0
        and (image // patch) ** 2 > max(largest, _HARMLESS)
    ):
        raise ModelError(
            f"{path}image_size={shortened(image)} with patches of {patch} in the configuration of {name!r} needs {(image // patch) ** 2} "
            f"positions, but no dimension of a tensor in its checkpoint is above {largest}: correct config.json"
        )
