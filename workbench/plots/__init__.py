"""Pictures, one function each, drawn into matplotlib Figures without pyplot state; no widgets, no engines."""

from .batches import plan_figure
from .errors import comparison_figure, error_by_layer, ratio_map
from .kernels import kernel_bars
from .landing import landing_figure
from .maps import hidden_state_map
from .patches import patch_figure
from .png import to_png
from .schedule import schedule_figure
from .tokens import token_strip

__all__ = [
    "comparison_figure",
    "error_by_layer",
    "hidden_state_map",
    "kernel_bars",
    "landing_figure",
    "patch_figure",
    "plan_figure",
    "ratio_map",
    "schedule_figure",
    "to_png",
    "token_strip",
]
