"""Load a reference's model: with its weights in memory, or streamed from the checkpoint."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...errors import ModelError
from ...models import Model
from ...models.sizes import check_sizes
from ...models.transformers_logging import silenced_transformers
from .float64 import rebuild_rotary_embeddings, widen
from .streamed_weights import RESIDENT_BYTES, StreamedWeights, checkpoint_names


def load_network(model: Model, dtype: torch.dtype, device: torch.device) -> Any:
    """Transformers' model, with its weights in memory or, on the CPU, streamed if they are large."""
    check_sizes(model.config, model.weights, model.name)
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


def _resident(model: Model, dtype: torch.dtype) -> Any:
    try:
        narrow = torch.float32 if dtype is torch.float64 else dtype
        with silenced_transformers():  # a memory-mapped load takes a second or two
            pair: Any = _class_for(model).from_pretrained(
                model.path,
                dtype=narrow,
                trust_remote_code=model.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                # Torch's grouped product of experts has no float64, and is a kernel that a reference should not depend on.
                experts_implementation="eager",
                ignore_mismatched_sizes=True,  # rejected below, by name
            )
    except Exception as error:  # Transformers raises many kinds of errors for a damaged or foreign folder
        raise ModelError(f"Transformers cannot load {model.name!r} from {model.path}: {error}") from error
    network, loaded = pair
    lacking = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
    if lacking:  # Transformers would only warn, and fill them with random numbers
        raise ModelError(
            f"{model.path} lacks {len(lacking)} tensors that {model.name!r} needs, or has them in another shape: "
            f"{', '.join(lacking[:3])}{' ...' * (len(lacking) > 3)}. Fetch the checkpoint again"
        )
    return widen(network) if dtype is torch.float64 else network


def _class_for(model: Model) -> Any:
    """The class to load: the one that the checkpoint names if it is multimodal, or if its configuration is not in Transformers' mapping."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    multimodal = any(getattr(model.config, part, None) is not None for part in ("vision_config", "audio_config"))
    names = [name for name in model.config.architectures or () if hasattr(transformers, name)]
    own = multimodal or type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return getattr(transformers, names[0]) if own and names else transformers.AutoModelForCausalLM
