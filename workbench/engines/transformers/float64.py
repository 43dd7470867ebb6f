"""Make a Transformers model compute entirely in float64.

`model.to(torch.float64)` is not enough: RMSNorm, rotary angles and some softmaxes cast explicitly to float32, so the states of
such a model have relative errors of 2e-8 to 2e-7 (SmolLM2-135M, 241 tokens), up to a tenth of the tolerance for a float32 engine.
Inside `KeepFloat64` those casts go to float64, and `widen` recomputes the rotary frequencies, which are otherwise float32 numbers.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


class KeepFloat64(TorchFunctionMode):
    """A context in which every torch call that asks for float32 (`x.float()`, `dtype=torch.float32`) gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def widen(model: torch.nn.Module) -> torch.nn.Module:
    """Convert a model's weights to float64 in place, rebuild its rotary embeddings with float64 frequencies, and return it.

    Its forward passes must run inside `KeepFloat64`.
    """
    for module in model.modules():  # Module.to would cast complex buffers to real numbers
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
                    tensor.data = tensor.data.to(torch.float64 if tensor.is_floating_point() else torch.complex128)
    rebuild_rotary_embeddings(model)
    return model


def rebuild_rotary_embeddings(model: torch.nn.Module) -> None:
    """Replace every rotary embedding of a model, in place, by one whose frequencies were computed in float64."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if "inv_freq" in dict(child.named_buffers(recurse=False)) and hasattr(child, "config"):
                with KeepFloat64():
                    setattr(parent, name, type(child)(child.config).to(next(child.buffers()).device))
