"""Engines, all behind one interface (`api.Engine`): open one by kind."""

from __future__ import annotations

from ..errors import ModelError
from ..models import Model
from .api import Engine

KINDS = ("numba", "transformers", "transformers-multimodal")


def open_engine(kind: str, model: Model, **options) -> Engine:
    """Open an engine on a model.

    Args:
        kind: "numba", this project's own engine; "transformers", the reference; or "transformers-multimodal", Transformers with
            the vision model inside, which takes pictures and no embeddings.
        model: from `workbench.load_model`.
        options: `dtype` ("float32", "bfloat16", "float16"; the reference also "float64"), `device` ("cpu", "cuda").

    Raises:
        ModelError: no such engine, or one that cannot run this model.
    """
    if not isinstance(model, Model):
        raise ModelError(f"open_engine needs a model from workbench.load_model, not {model!r}")
    if kind == "numba":
        from .numba_engine.engine import NumbaEngine

        return NumbaEngine(model, **options)
    if kind == "transformers":
        from .transformers_reference import TransformersReference

        return TransformersReference(model, **options)
    if kind == "transformers-multimodal":
        from .transformers_multimodal import TransformersMultimodal

        return TransformersMultimodal(model, **options)
    raise ModelError(f"no engine {kind!r}: choose one of {', '.join(KINDS)}")
