"""Compare an engine's trace with the reference: metrics, noise floor, verdict, first divergence."""

from .check import check_engine
from .divergence import FirstDivergence, first_divergence
from .local_error import LocalError, local_error
from .logits import compare_logits, compare_text
from .noise_floor import NoiseFloor
from .verdict import FACTOR, Comparison, Divergence, compare

__all__ = [
    "FACTOR",
    "Comparison",
    "Divergence",
    "FirstDivergence",
    "LocalError",
    "NoiseFloor",
    "check_engine",
    "compare",
    "compare_logits",
    "compare_text",
    "first_divergence",
    "local_error",
]
