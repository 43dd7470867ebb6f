"""Engines, all behind one interface (`api.Engine`): open one by kind."""

from __future__ import annotations

from importlib import import_module

from ..errors import ModelError
from ..models import Model
from .api import Engine

# Imported when asked for: an engine brings libraries along that another does not need.
_PLACES = {
    "numba": ("numba_engine.engine", "NumbaEngine"),
    "transformers": ("transformers_reference", "TransformersReference"),
    "transformers-multimodal": ("transformers_multimodal", "TransformersMultimodal"),
    "turbomind": ("turbomind", "TurboMindEngine"),
    "lmdeploy-pytorch": ("lmdeploy_pytorch", "LMDeployPyTorch"),
}
KINDS = tuple(_PLACES)


def open_engine(kind: str, model: Model, *, isolated: bool = False, **options) -> Engine:
    """Open an engine on a model.

    Args:
        kind: "numba", this project's own engine; "transformers", the reference; "transformers-multimodal", Transformers with the
            vision model inside, which takes pictures and no embeddings; "turbomind", LMDeploy's; "lmdeploy-pytorch", its other one.
        model: from `workbench.load_model`.
        isolated: open it in a process of its own, so that a crash there leaves this one alone.
        options: `dtype` ("float32", "bfloat16", "float16"; the reference also "float64"), `device` ("cpu", "cuda"), and those of
            the engine's class.

    Raises:
        ModelError: no such engine, or one that cannot run this model.
    """
    if not isinstance(model, Model):
        raise ModelError(f"open_engine needs a model from workbench.load_model, not {model!r}")
    if kind not in _PLACES:
        raise ModelError(f"no engine {kind!r}: choose one of {', '.join(KINDS)}")
    if isolated:
        from .child import ChildEngine

        return ChildEngine(kind, model, **options)
    module, name = _PLACES[kind]
    engine: Engine = getattr(import_module(f".{module}", __name__), name)(model, **options)
    return engine
