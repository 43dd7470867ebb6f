"""Settings that many families share: windows and rotary embeddings of each layer, sections of M-RoPE."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .architectures import Window
from .rope import Rope, read_rope


def windows(config: Any) -> tuple[Window, ...]:
    """Windows by `layer_types`; without that setting, the same window in all layers."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def same_window(config: Any) -> tuple[Window, ...]:
    """The window of classes that ignore `layer_types`."""
    return (getattr(config, "sliding_window", None),) * config.num_hidden_layers


def ropes_by_kind(config: Any) -> tuple[Rope, ...]:
    """The rotary embedding of each layer, of which each kind of layer has its own."""
    ropes = {
        kind: read_rope(config, _head_dim(config), config.model_type, layer_type=kind)
        for kind in set(config.layer_types)
    }
    return tuple(ropes[kind] for kind in config.layer_types)


def ropes_where(config: Any, used: Iterable[Any], interleaved: bool = False) -> tuple[Rope | None, ...]:
    """The rotary embedding of the layers that use it."""
    rope = read_rope(config, _head_dim(config), config.model_type, interleaved=interleaved)
    return tuple(rope if each else None for each in used)


def mrope_sections(config: Any, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    """How many channel pairs M-RoPE rotates by time, height and width; `otherwise` is the class's default."""
    return tuple((config.rope_parameters or {}).get("mrope_section") or otherwise)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
