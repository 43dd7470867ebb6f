"""Open an engine by its kind; all engines share the interface `base.Engine`."""

from __future__ import annotations

from importlib import import_module

from ..errors import ModelError
from ..models import Model
from .base import Engine

# Imported on demand: each engine has dependencies that the others do not need.
_CLASSES = {
    "numba": ("numba_engine.engine", "NumbaEngine"),
    "transformers": ("transformers.reference", "TransformersReference"),
    "transformers-multimodal": ("transformers.multimodal", "TransformersMultimodal"),
    "turbomind": ("lmdeploy.turbomind", "TurboMindEngine"),
    "lmdeploy-pytorch": ("lmdeploy.pytorch", "LMDeployPyTorch"),
}
KINDS = tuple(_CLASSES)


def open_engine(kind: str, model: Model, *, isolated: bool = False, **options) -> Engine:
    """Open an engine on a model.

    Args:
        kind: "numba" (this project's engine), "transformers" (the reference), "transformers-multimodal" (Transformers with the
            vision model inside; takes images, not embeddings), "turbomind" or "lmdeploy-pytorch" (LMDeploy's two engines).
        model: from `workbench.load_model`.
        isolated: open it in a separate process, so that a crash there does not affect this one.
        options: `dtype` ("float32", "bfloat16", "float16"; the reference also "float64"), `device` ("cpu", "cuda"), and the
            arguments of the engine's class.

    Raises:
        ModelError: the kind is unknown, or the engine cannot run this model.
    """
    if not isinstance(model, Model):
        raise ModelError(f"open_engine needs a model from workbench.load_model, not {model!r}")
    if kind not in _CLASSES:
        raise ModelError(f"no engine {kind!r}: choose one of {', '.join(KINDS)}")
    module, name = _CLASSES[kind]
    if isolated:
        from .process_engine import ProcessEngine

        return ProcessEngine(kind, (f"{__name__}.{module}", name), model, **options)
    engine: Engine = getattr(import_module(f".{module}", __name__), name)(model, **options)
    return engine
