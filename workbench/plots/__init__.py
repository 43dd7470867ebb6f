"""Plot functions. Each returns a new matplotlib Figure, independent of pyplot; they draw given data and run no engines.

`to_png` renders a Figure as PNG bytes.
"""

from .decode_step import step_roofline, step_timeline
from .errors import comparison_figure, error_by_layer, local_error_by_layer, ratio_map
from .heat_map import hidden_state_map
from .injection_effect import injection_effect_figure
from .kernels import kernel_bars
from .packing import plan_figure
from .png import to_png
from .schedule import schedule_figure
from .tokens import token_strip

__all__ = [
    "comparison_figure",
    "error_by_layer",
    "hidden_state_map",
    "injection_effect_figure",
    "kernel_bars",
    "local_error_by_layer",
    "plan_figure",
    "ratio_map",
    "schedule_figure",
    "step_roofline",
    "step_timeline",
    "to_png",
    "token_strip",
]
