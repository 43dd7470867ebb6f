"""Widgets: controls and what they show. They call engines and plots, and hold no maths of their own."""

from .batches import PlanBench
from .comparison import ComparisonBench
from .comparison_view import ComparisonView
from .engine import EngineView
from .explorer import Explorer
from .hidden_state_map import HiddenStateMap
from .landing import LandingBench
from .patch_view import PatchView
from .pictures import PictureBench
from .range_editor import RangeEditor

__all__ = [
    "ComparisonBench",
    "ComparisonView",
    "EngineView",
    "Explorer",
    "HiddenStateMap",
    "LandingBench",
    "PatchView",
    "PictureBench",
    "PlanBench",
    "RangeEditor",
]
