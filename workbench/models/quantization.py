"""Whether a checkpoint's weights are quantized: codes that mean nothing without their scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def quantization_settings(config: Any) -> Mapping[str, Any] | None:
    """The quantization settings, with `quant_method`; None for plain weights.

    Args:
        config: Transformers' configuration of a whole model. Classes keep `quantization_config` at the top or in one of its parts; all
            are searched.
    """
    own = getattr(config, "quantization_config", None)
    if own is not None:
        settings = dict(own) if isinstance(own, Mapping) else own.to_dict()
        method = settings.get("quant_method") or settings.get("quant_algo") or "unknown"
        return {**settings, "quant_method": str(getattr(method, "value", method))}
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {})
    found = (quantization_settings(part) for part in parts if part is not None)
    return next((each for each in found if each is not None), None)


def without_quantization(config: Any) -> Any:
    """Remove the settings from a configuration and its parts, in place, and return it."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {})):
        if part is not None and getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config
