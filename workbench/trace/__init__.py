"""Traces: named hidden states of one run, in memory or on disk."""

from .patch import Patch
from .trace import Trace, TracePlan

__all__ = ["Patch", "Trace", "TracePlan"]
