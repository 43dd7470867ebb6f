"""Widgets for notebooks: controls and views.

They call engines, `analysis` and `plots`, and contain no computations of their own.
"""

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
