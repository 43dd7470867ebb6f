"""Compare an engine's trace with the truth: metrics, noise floor, verdict, first divergence."""

from .divergence import FirstDivergence, first_divergence
from .faults import FaultyEngine
from .floor import NoiseFloor
from .logits import compare_logits, compare_text
from .run import check_engine
from .verdict import FACTOR, Comparison, Divergence, compare

__all__ = [
    "FACTOR",
    "Comparison",
    "Divergence",
    "FaultyEngine",
    "FirstDivergence",
    "NoiseFloor",
    "check_engine",
    "compare",
    "compare_logits",
    "compare_text",
    "first_divergence",
]
