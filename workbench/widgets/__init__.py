"""Widgets: controls and views for notebooks. They call engines and plots, and compute nothing themselves."""

from .comparison_view import ComparisonView
from .engine_view import EngineView
from .explorer import Explorer
from .hidden_state_map import HiddenStateMap
from .packing_panel import PackingPanel
from .patch_view import PatchView
from .range_editor import RangeEditor

__all__ = [
    "ComparisonView",
    "EngineView",
    "Explorer",
    "HiddenStateMap",
    "PackingPanel",
    "PatchView",
    "RangeEditor",
]
