"""Compare an engine's trace with the truth: metrics, noise floor, verdict."""

from .faults import FaultyEngine
from .run import check_engine
from .verdict import Comparison, Divergence, compare

__all__ = ["Comparison", "Divergence", "FaultyEngine", "check_engine", "compare"]
