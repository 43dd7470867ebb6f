"""A Transformers model without weights: parameters on the meta device, buffers that the class computes filled."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ...models import Model
from ...models.quantization import without_quantization
from .float64 import widen
from .parameter_reader import NotStreamable


def build_meta_network(network_class: Any, model: Model, dtype: torch.dtype) -> Any:
    """Build a model from its configuration, in the dtype of a run.

    Raises:
        NotStreamable: the class cannot be built so, or leaves buffers unfilled that are not in checkpoints.
    """
    narrow = torch.float32 if dtype is torch.float64 else dtype
    config = without_quantization(copy.deepcopy(model.config))
    build = getattr(network_class, "_from_config", None) or network_class.from_config
    try:
        with torch.device("meta"):
            # Torch's grouped product of experts has no float64, and is a kernel that a reference should not depend on.
            network = build(config, dtype=narrow, experts_implementation="eager")
    except Exception as error:  # whatever a class raises that computes with its weights when it is built
        raise NotStreamable(f"{network_class.__name__} cannot be built without weights: {error}") from error
    _fill_buffers(network)
    _check_embeddings_are_kept(network)
    return (widen(network) if dtype is torch.float64 else network).eval()


def parameter_dtypes(network: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of every parameter and persistent buffer in a run in `dtype`; some classes keep parts in float32."""
    from transformers.core_model_loading import build_glob_alternation

    found = {name: each.dtype for name, each in network.state_dict().items()}
    plan = network._get_dtype_plan(dtype)
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan))
        matches = {name: pattern.search(name) for name in found}
        found |= {name: plan[by_group[str(match.lastgroup)]] for name, match in matches.items() if match is not None}
    return found


def _fill_buffers(network: Any) -> None:
    """Let the class compute the buffers that checkpoints do not have, such as rotary frequencies."""
    persistent = set(network.state_dict())
    owned = [
        (module, name, f"{prefix}.{name}" if prefix else name)
        for prefix, module in network.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    for module, name, full in owned:
        if full not in persistent:
            buffer = module._buffers[name]
            unset = torch.empty(buffer.shape, dtype=buffer.dtype)
            module._buffers[name] = unset.fill_(float("nan")) if unset.is_floating_point() else unset.fill_(_UNSET)
    for module in network.modules():
        module._is_hf_initialized = False
    with torch.random.fork_rng(devices=[]):
        network.initialize_weights()
    for module, name, full in owned:
        buffer = module._buffers[name]
        if full not in persistent and buffer.numel() and bool(_unset(buffer).any()):
            raise NotStreamable(f"{type(network).__name__} does not compute its buffer {full} by itself")


def _check_embeddings_are_kept(network: Any) -> None:
    """Refuse classes with which Transformers changes what it loads: Youtu's initialization zeroes the padding row of loaded embeddings."""
    from transformers import PreTrainedModel

    for module in network.modules():
        if isinstance(module, PreTrainedModel):
            table = nn.Embedding(2, 1, padding_idx=1)
            table.weight = nn.Parameter(torch.ones(2, 1), requires_grad=False)
            table.weight._is_hf_initialized = True  # type: ignore[attr-defined]
            try:
                module._init_weights(table)
            except Exception as error:  # whatever a class raises for a module that is not its own
                raise NotStreamable(
                    f"what {type(module).__name__} does to loaded embeddings cannot be tried"
                ) from error
            if not bool((table.weight == 1).all()):
                raise NotStreamable(f"{type(module).__name__} changes embeddings when they are loaded")


_UNSET = 77
"""What integers are filled with before the class computes them; a buffer that has it throughout was not computed."""


def _unset(buffer: torch.Tensor) -> torch.Tensor:
    return buffer.isnan() if buffer.is_floating_point() else (buffer == _UNSET).all()
