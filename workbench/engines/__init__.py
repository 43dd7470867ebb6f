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
    "vllm": ("vllm.engine", "VllmEngine"),
    "llama-cpp": ("llama_cpp.engine", "LlamaCppEngine"),
}
KINDS = tuple(_CLASSES)


def open_engine(kind: str, model: Model, *, isolated: bool = False, **options) -> Engine:
    """Open an engine on a model and return it. The caller closes it: `with open_engine(...) as engine`, or `engine.close()`.

    Args:
        kind: "numba" (this project's engine), "transformers" (the reference), "transformers-multimodal" (Transformers with the
            vision model inside; takes images, not embeddings), "turbomind" or "lmdeploy-pytorch" (LMDeploy's two engines), "vllm" or
            "llama-cpp" (in environments of their own: `workbench engines install vllm`).
        model: from `workbench.load_model`.
        isolated: open it in a child process. If that crashes, requests raise EngineDied and this process goes on.
        options: `dtype` ("float32", "bfloat16", "float16"; the reference also "float64"), `device` ("cpu", "cuda"), and the
            arguments of the engine's class.

    Raises:
        ModelError: the kind is unknown, the device is not available, or the engine cannot run this model.
        ValueError: a dtype that the engine does not run in, or an invalid argument of the engine.
        TypeError: an argument that the engine does not have.
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
