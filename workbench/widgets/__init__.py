"""Widgets: controls and what they show. They call engines and plots, and hold no maths of their own."""

from .batches import PlanBench
from .comparison import ComparisonBench
from .engine import EngineView
from .landing import LandingBench
from .pictures import PictureBench
from .range_editor import RangeEditor

__all__ = ["ComparisonBench", "EngineView", "LandingBench", "PictureBench", "PlanBench", "RangeEditor"]
