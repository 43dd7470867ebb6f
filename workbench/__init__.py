"""Embedding Workbench: see what injected embeddings change in a model, and whether an engine computes it correctly.

model = workbench.load_model("smollm2-135m")
engine = workbench.open_engine("numba", model)
prompt = workbench.Prompt(ids, [rows], [(12, 14)])
print(workbench.check_engine(engine, prompt))

Names are imported when they are first used, so that `import workbench` and the command line start without torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis.attribution import attribute
    from .comparison.check import check_engine
    from .comparison.divergence import first_divergence
    from .comparison.identify import identify
    from .comparison.local_error import local_error
    from .comparison.probes import probe
    from .comparison.rollout import judge_rollout
    from .comparison.verdict import Comparison, compare
    from .engines import open_engine
    from .engines.base import Engine
    from .engines.function_engine import engine_from
    from .engines.types import EngineOutput, GenerationConfig, ResponseType
    from .errors import EmbeddingRangeError, ModelError, PromptError, TraceError
    from .exploring import explore
    from .linting import effective_prompt, lint
    from .models import Model, load_model
    from .prompt import Finding, MultimodalPrompt, Prompt, Span
    from .recording import Recording, record
    from .trace import Patch, Trace
    from .version import __version__
    from .vision import build_multimodal, build_prompt, load_vision_tower

_MODULES = {
    "Comparison": "comparison.verdict",
    "EmbeddingRangeError": "errors",
    "Engine": "engines.base",
    "EngineOutput": "engines.types",
    "Finding": "prompt",
    "GenerationConfig": "engines.types",
    "Model": "models",
    "ModelError": "errors",
    "MultimodalPrompt": "prompt",
    "Patch": "trace",
    "Prompt": "prompt",
    "PromptError": "errors",
    "Recording": "recording",
    "ResponseType": "engines.types",
    "Span": "prompt",
    "Trace": "trace",
    "TraceError": "errors",
    "__version__": "version",
    "attribute": "analysis.attribution",
    "build_multimodal": "vision",
    "build_prompt": "vision",
    "check_engine": "comparison.check",
    "compare": "comparison.verdict",
    "effective_prompt": "linting",
    "engine_from": "engines.function_engine",
    "explore": "exploring",
    "first_divergence": "comparison.divergence",
    "identify": "comparison.identify",
    "judge_rollout": "comparison.rollout",
    "lint": "linting",
    "local_error": "comparison.local_error",
    "load_model": "models",
    "load_vision_tower": "vision",
    "open_engine": "engines",
    "probe": "comparison.probes",
    "record": "recording",
}

__all__ = [
    "Comparison",
    "EmbeddingRangeError",
    "Engine",
    "EngineOutput",
    "Finding",
    "GenerationConfig",
    "Model",
    "ModelError",
    "MultimodalPrompt",
    "Patch",
    "Prompt",
    "PromptError",
    "Recording",
    "ResponseType",
    "Span",
    "Trace",
    "TraceError",
    "__version__",
    "attribute",
    "build_multimodal",
    "build_prompt",
    "check_engine",
    "compare",
    "effective_prompt",
    "engine_from",
    "explore",
    "first_divergence",
    "identify",
    "judge_rollout",
    "lint",
    "load_model",
    "load_vision_tower",
    "local_error",
    "open_engine",
    "probe",
    "record",
]


class _BeforeTorchvision:
    """A finder that finds nothing: it only prepares the first import of torchvision, whoever asks for it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import_module(".models.torchvision_import", __name__).declare_missing_operators()


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _BeforeTorchvision())


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
