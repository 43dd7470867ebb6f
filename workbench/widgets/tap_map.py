"""A diagram of the model: its layers with the taps at their places, and the spans that enter at the splice; a click chooses a tap."""

from __future__ import annotations

from typing import Any

import traitlets

from ..engines.base import Engine
from ..plots.figure import Figure
from ..plots.tap_map import tap_map_figure
from ..plots.visible_text import escaped
from ..prompt import Prompt
from .view import View, source


class TapMap(View):
    """A column with one block per layer, from the last at the top to the splice at the bottom.

    Traits to link: `tap`, the chosen tap, or "".

    Args:
        engine: its taps are offered, so an engine without `layers.N.attention` shows whole layers only.
        prompt: its ranges are shown where they enter.
    """

    _esm = source("shared.js", "tap_map.js")
    _css = source("views.css")

    layers = traitlets.List(traitlets.Dict()).tag(sync=True)
    ends = traitlets.List(traitlets.Unicode()).tag(sync=True)
    spans = traitlets.List(traitlets.Unicode()).tag(sync=True)
    tap = traitlets.Unicode("").tag(sync=True)

    def __init__(self, engine: Engine, prompt: Prompt) -> None:
        taps = set(engine.capabilities.taps)
        super().__init__(
            layers=_layers(engine.model.text_config, taps), ends=[tap for tap in ("embed", "norm") if tap in taps]
        )
        self.show(prompt)

    def show(self, prompt: Prompt) -> None:
        """Show the ranges of another prompt."""
        names = [span.label or f"{span.modality} {number}" for number, span in enumerate(prompt.spans)]
        names = names or [f"range {number}" for number in range(len(prompt.embedding_ranges))]
        self.spans = [
            f"{escaped(name)} [{start}, {stop})"
            for name, (start, stop) in zip(names, prompt.embedding_ranges, strict=False)
        ]

    def figure(self) -> Figure:
        """Return the diagram as a matplotlib figure."""
        return tap_map_figure(self.layers, self.ends, self.spans, self.tap)


def _layers(config: Any, taps: set[str]) -> list[dict[str, Any]]:
    """For each layer its taps, and what its attention is, as far as the configuration says."""
    kinds = getattr(config, "layer_types", None) or []
    found = []
    for number in range(config.num_hidden_layers):
        kind = str(kinds[number]).replace("_", " ") if number < len(kinds) else "attention"
        heads = f"{config.num_attention_heads} heads, {getattr(config, 'num_key_value_heads', None) or config.num_attention_heads} of keys"
        names = [
            tap for tap in (f"layers.{number}.attention", f"layers.{number}.mlp", f"layers.{number}") if tap in taps
        ]
        found.append({"number": number, "taps": names, "about": f"{kind}: {heads}"})
    return [layer for layer in found if layer["taps"]]
