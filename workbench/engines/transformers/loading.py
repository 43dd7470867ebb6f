"""Load a reference's model: with its weights in memory, or streamed from the checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import ModelError, reason
from ...models import Model
from ...models.quantization import quantization_settings, without_quantization
from ...models.quantized_weights import plain_weights
from ...models.sizes import check_sizes
from ...models.transformers_logging import silenced_transformers
from .float64 import rebuild_rotary_embeddings, widen
from .streamed_weights import RESIDENT_BYTES, StreamedWeights, checkpoint_names


def load_network(model: Model, dtype: torch.dtype, device: torch.device) -> Any:
    """Transformers' model, with its weights in memory or, on the CPU, streamed if they are large."""
    check_sizes(model.config, model.weights, model.name)
    quantized = quantization_settings(model.config)
    if quantized is not None:
        return _dequantized(model, dtype, quantized).to(device).eval()
    size = sum(entry.bytes // entry.dtype.itemsize for entry in model.weights.entries(model.weights).values())
    streamed = None
    if device.type == "cpu" and size * dtype.itemsize > RESIDENT_BYTES:
        streamed = _streamed(model, dtype)
    return _resident(model, dtype).to(device).eval() if streamed is None else streamed


def _streamed(model: Model, dtype: torch.dtype) -> Any:
    """The model with streamed weights; None if its checkpoint must be loaded by Transformers."""
    network_class = _class_for(model)
    if any(getattr(network_class, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")):
        return None
    build = getattr(network_class, "_from_config", None) or network_class.from_config
    with torch.device("meta"):
        network = build(copy.deepcopy(model.config), dtype=torch.float32, experts_implementation="eager")
    names = checkpoint_names(network, model)
    if names is None:
        return None
    for parent in list(network.modules()):  # buffers are computed from the configuration, as Transformers does
        for name, child in list(parent.named_children()):
            if "inv_freq" in dict(child.named_buffers(recurse=False)) and hasattr(child, "config"):
                setattr(parent, name, type(child)(child.config))
    if any(buffer.device.type == "meta" for buffer in network.buffers()):
        return None
    if dtype is torch.float64:
        rebuild_rotary_embeddings(network)
    StreamedWeights(network, model, names, dtype)
    return network.eval()


def _dequantized(model: Model, dtype: torch.dtype, settings: Mapping[str, Any]) -> Any:
    """The model with the weights that the codes and scales stand for; in float64 they are exact."""
    config = without_quantization(copy.deepcopy(model.config))
    names = list(model.weights)
    weights = {name: tensor.to(dtype) for name, tensor in plain_weights(names, model.weights.get, settings, model.name)}
    network_class = _class_for(model)
    mapping = getattr(
        network_class, "_model_mapping", None
    )  # the automatic classes want a path; their mapping has the class
    if mapping is not None:
        network_class = mapping[type(config)]
    network = _from_pretrained(model, network_class, None, config=config, state_dict=weights, dtype=dtype)
    if dtype is torch.float64:
        rebuild_rotary_embeddings(network)
    return network


def _resident(model: Model, dtype: torch.dtype) -> Any:
    narrow = torch.float32 if dtype is torch.float64 else dtype
    network = _from_pretrained(
        model,
        _class_for(model),
        model.path,
        dtype=narrow,
        trust_remote_code=model.trust_remote_code,
        use_safetensors=True,
    )
    return widen(network) if dtype is torch.float64 else network


def _from_pretrained(model: Model, network_class: Any, path: Any, **options: Any) -> Any:
    try:
        with silenced_transformers():  # a memory-mapped load takes a second or two
            pair: Any = network_class.from_pretrained(
                path,
                output_loading_info=True,
                # Torch's grouped product of experts has no float64, and is a kernel that a reference should not depend on.
                experts_implementation="eager",
                ignore_mismatched_sizes=True,  # rejected below, by name
                **options,
            )
    except Exception as error:  # Transformers raises many kinds of errors for a damaged or foreign folder
        raise ModelError(f"Transformers cannot load {model.name!r} from {model.path}: {reason(error)}") from error
    network, loaded = pair
    lacking = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
    if lacking:  # Transformers would only warn, and fill them with random numbers
        raise ModelError(
            f"{model.path} lacks {len(lacking)} tensors that {model.name!r} needs, or has them in another shape: "
            f"{', '.join(lacking[:3])}{' ...' * (len(lacking) > 3)}. Fetch the checkpoint again"
        )
    return network


def _class_for(model: Model) -> Any:
    """The class to load: the one that the checkpoint names if it is multimodal, or if its configuration is not in Transformers' mapping."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    multimodal = any(getattr(model.config, part, None) is not None for part in ("vision_config", "audio_config"))
    names = [name for name in model.config.architectures or () if hasattr(transformers, name)]
    own = multimodal or type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return getattr(transformers, names[0]) if own and names else transformers.AutoModelForCausalLM
