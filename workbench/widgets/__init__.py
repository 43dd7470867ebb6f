"""Widgets: controls and what they show. They call engines and plots, and hold no maths of their own."""

from .comparison import ComparisonBench
from .landing import LandingBench

__all__ = ["ComparisonBench", "LandingBench"]
