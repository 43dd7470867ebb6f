"""Load a reference's model: with its weights in memory, or streamed from the checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ...errors import ModelError, reason
from ...models import Model
from ...models.checkpoint import Checkpoint
from ...models.quantization import quantization_settings, without_quantization
from ...models.quantized_weights import plain_weights
from ...models.sizes import check_sizes
from ...models.sources import FolderSource
from ...models.stored_tensor import StoredTensor
from ...models.transformers_logging import silenced_transformers
from .float64 import rebuild_rotary_embeddings, widen
from .memory import free_memory, weight_bytes
from .meta_network import build_meta_network, parameter_dtypes
from .network import layers_path
from .parameter_reader import NotStreamable, ParameterReader
from .streamed_weights import StreamedWeights

STREAMED_BYTES = 1 << 28
"""If its weights take more bytes, a reference on the CPU reads them when a layer runs: it takes no longer, and much less memory."""


def load_network(
    model: Model, dtype: torch.dtype, device: torch.device, streamed: bool | None
) -> tuple[Any, StreamedWeights | None]:
    """Load Transformers' model.

    Args:
        streamed: whether to stream the weights; None: if they are large (on the CPU) or do not fit (elsewhere).

    Returns:
        the model, and its streamed weights; None if they are in memory.

    Raises:
        ModelError: the model cannot be loaded; or it does not fit into memory, or `streamed` is True, and its weights cannot be streamed.
    """
    check_sizes(model.config, model.weights, model.name)
    needed, free = weight_bytes(model, dtype), free_memory(device)
    wanted = (
        (needed > STREAMED_BYTES if device.type == "cpu" else needed > 0.8 * free) if streamed is None else streamed
    )
    if wanted:
        try:
            weights = _streamed(model, dtype, device)
            return weights.new_network(), weights
        except NotStreamable as why:
            if streamed or needed > free:
                need = f"{needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, and {free / 1e9:.1f} GB are free"
                fix = "leave streamed=True out" if needed <= free else "use a machine with more memory"
                raise ModelError(
                    f"the weights of {model.name!r} cannot be streamed: {why}. All at once they take {need}: {fix}"
                ) from why
    elif streamed is False and needed > free:
        raise ModelError(
            f"the weights of {model.name!r} take {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, and "
            f"{free / 1e9:.1f} GB are free: leave streamed=False out"
        )
    quantized = quantization_settings(model.config)
    network = _resident(model, dtype) if quantized is None else _dequantized(model, dtype, quantized)
    # With gradients, torch takes other kernels for convolutions, and streamed weights have none.
    return network.to(device).eval().requires_grad_(False), None


def _streamed(model: Model, dtype: torch.dtype, device: torch.device) -> StreamedWeights:
    if model.trust_remote_code:
        raise NotStreamable("it has code of its own (trust_remote_code)")
    with silenced_transformers():
        network = build_meta_network(_class_for(model), model, dtype)
    source = FolderSource(model.path)  # mappings of its own: releasing their memory does not affect `model.weights`
    reader = ParameterReader(network, stored_tensors(model, Checkpoint(source)), model.name)
    for module in network.modules():  # buffers that checkpoints do not have are small
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
    dtypes = parameter_dtypes(network, dtype)
    return StreamedWeights(network, reader, dtypes, dtype, device, source, layers_path(network))


def stored_tensors(model: Model, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The weights of a checkpoint by name; those that are quantized are read as what codes and scales stand for."""
    settings = quantization_settings(model.config)
    if settings is not None:
        return plain_weights(checkpoint, settings, model.name)
    return {
        name: StoredTensor(entry.shape, entry.dtype, partial(checkpoint.get, name), (entry,))
        for name, entry in checkpoint.entries(checkpoint).items()
    }


def _dequantized(model: Model, dtype: torch.dtype, settings: Mapping[str, Any]) -> Any:
    """The model with the weights that the codes and scales stand for; in float64 they are exact."""
    config = without_quantization(copy.deepcopy(model.config))
    weights = {
        name: stored.read().to(dtype) for name, stored in plain_weights(model.weights, settings, model.name).items()
    }
    network = _from_pretrained(model, _class_for(model), None, config=config, state_dict=weights, dtype=dtype)
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
    known = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if (multimodal or not known) and names:
        return getattr(transformers, names[0])
    if not known or model.trust_remote_code:
        return transformers.AutoModelForCausalLM
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]
    if isinstance(found, tuple | list):
        return next((each for each in found if each.__name__ in names), found[0])
    return found
