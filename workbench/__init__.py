"""Embedding Workbench: see where embeddings land in a language model, and whether an engine computes what it should.

model = workbench.load_model("smollm2-135m")
engine = workbench.open_engine("numba", model)
prompt = workbench.Prompt(ids, [rows], [(12, 14)])
print(workbench.check_engine(engine, prompt))
"""

from .compare import Comparison, check_engine, compare, first_divergence
from .engines import open_engine
from .engines.api import Engine
from .engines.messages import EngineOutput, GenerationConfig, ResponseType
from .errors import EmbeddingRangeError, ModelError, PromptError, TraceError
from .exploring import explore
from .findings import Finding
from .linting import effective_prompt, lint
from .models import Model, load_model
from .probes import probe
from .prompt import MultimodalPrompt, Prompt, Span
from .recording import Recording, record
from .trace import Trace
from .version import __version__
from .vision import build_multimodal, build_prompt, load_vision_tower

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
    "Prompt",
    "PromptError",
    "Recording",
    "ResponseType",
    "Span",
    "Trace",
    "TraceError",
    "__version__",
    "build_multimodal",
    "build_prompt",
    "check_engine",
    "compare",
    "effective_prompt",
    "explore",
    "first_divergence",
    "lint",
    "load_model",
    "load_vision_tower",
    "open_engine",
    "probe",
    "record",
]
