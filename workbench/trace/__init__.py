"""Traces: named hidden states of one run, in memory or on disk."""

from .trace import Trace, TracePlan

__all__ = ["Trace", "TracePlan"]
