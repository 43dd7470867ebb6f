"""Maps of hidden states, a number for each layer and token: what the views colour, computed once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from .compare import Comparison
from .compare.metrics import cosine, relative_error
from .engines.api import Engine
from .progress import Progress
from .prompt import Prompt
from .ranges import Range
from .trace import Trace


@dataclass(frozen=True)
class Metric:
    """How numbers of a map are shown.

    Attributes:
        title: what a number is.
        scale: "log" or "linear".
        low, high: ends of the colour scale; None takes them from the numbers.
        palette: of matplotlib.
        unit: written after a number that is read out.
    """

    title: str
    scale: Literal["log", "linear"]
    low: float | None
    high: float | None
    palette: str
    unit: str = ""


METRICS: Mapping[str, Metric] = {
    "change": Metric("change by the embeddings, |Δ| / |plain|; white: exactly none", "log", 1e-3, 3.0, "magma_r"),
    "cosine": Metric("cosine to the run without embeddings", "linear", 0.0, 1.0, "viridis"),
    "norm": Metric("2-norm of the state", "log", None, None, "cividis"),
    "error": Metric("error to the reference, in noise floors", "log", 1 / 64, 64.0, "RdYlBu_r", " noise floors"),
    "lens": Metric("logit lens: probability of the likeliest word", "linear", 0.0, 1.0, "GnBu"),
}


@dataclass
class StateMaps:
    """Numbers of one run, by metric.

    Attributes:
        tokens: the prompt's ids as text; taps: names of the rows, from the first layer up.
        ranges: embedding ranges of the run.
        values: `{metric: float32 [taps, tokens]}`; metrics that nobody has computed are missing.
        words: the logit lens' likeliest words, `[taps][tokens]`, where it was computed.
        row_states: the states of a row, `[tokens, hidden]`; None where they are not kept.
    """

    tokens: Sequence[str]
    taps: Sequence[str]
    ranges: Sequence[Range]
    values: dict[str, np.ndarray]
    words: list[list[str]] = field(default_factory=list)
    row_states: Callable[[int], torch.Tensor] | None = None

    def bounds(self, metric: str) -> tuple[float, float]:
        """Ends of a metric's colour scale: its own, or the range of the middle 98 % of the finite numbers."""
        kind, values = METRICS[metric], self.values[metric]
        usable = values[np.isfinite(values) & ((values > 0) | (kind.scale == "linear"))]
        low, high = np.quantile(usable, [0.01, 0.99]) if usable.size else (0.1, 1.0)
        low, high = (
            float(low if kind.low is None else kind.low),
            float(high if kind.high is None else kind.high),
        )
        return (low, high) if high > low else (low, low * 1.0001 + 1e-9)

    def add_error(self, comparison: Comparison) -> None:
        """Take a comparison's errors in noise floors for the taps that both have.

        Raises:
            ValueError: a comparison of other tokens, or of none of these taps.
        """
        if comparison.positions.tolist() != list(range(len(self.tokens))):
            raise ValueError(
                f"the comparison holds {len(comparison.positions)} positions, the map {len(self.tokens)} tokens: compare all"
            )
        at = {tap: row for row, tap in enumerate(comparison.taps)}
        if not set(at) & set(self.taps):
            raise ValueError(f"the comparison holds none of the taps {', '.join(self.taps[:4])}, ...")
        ratios = comparison.ratios.numpy()
        missing = np.full(len(self.tokens), np.nan)
        rows = [ratios[at[tap]] if tap in at else missing for tap in self.taps]
        self.values["error"] = np.stack(rows).astype(np.float32)

    def add_lens(self, engine: Engine, progress: Progress | None = None) -> None:
        """Read every state through the final norm and the head: likeliest word and its probability.

        Raises:
            ModelError: an engine without a head to read through.
            ValueError: states are not kept.
        """
        if self.row_states is None:
            raise ValueError("these maps hold no states: make them with state_maps")
        chances, found = [], []
        for row, tap in enumerate(self.taps):
            states = self.row_states(row)
            logits = engine.lens(states, normed=tap == "norm")
            best = logits.float().softmax(dim=-1).max(dim=-1)
            chances.append(best.values.cpu().numpy())
            found.append(engine.model.tokens(best.indices.tolist()))
            if progress:
                progress((row + 1) / len(self.taps))
        self.values["lens"], self.words = np.stack(chances).astype(np.float32), found

    def neighbours(self, row: int, token: int, count: int = 6) -> list[tuple[int, float]]:
        """The tokens whose states at this row lie nearest by cosine, nearest first: (token, cosine)."""
        if self.row_states is None:
            return []
        states = self.row_states(row).float()
        near = torch.nn.functional.cosine_similarity(states, states[token : token + 1], dim=1)
        near = near.nan_to_num(-torch.inf)
        near[token] = -torch.inf
        order = near.argsort(descending=True)[: min(count, len(near) - 1)].tolist()
        return [(place, float(near[place])) for place in order]


def state_maps(engine: Engine, injected: Trace, plain: Trace, prompt: Prompt) -> StateMaps:
    """Maps of a run with its embeddings against the run of the bare ids; both traces hold all tokens.

    Args:
        plain: the trace of `prompt.bare`.
    """
    taps = [tap for tap in injected if tap != "logits" and tap in plain]
    values = {
        "change": np.stack([relative_error(injected[tap], plain[tap]).numpy() for tap in taps]),
        "cosine": np.stack([cosine(injected[tap], plain[tap]).numpy() for tap in taps]),
        "norm": np.stack([injected[tap].double().norm(dim=1).numpy() for tap in taps]),
    }
    return StateMaps(
        engine.model.tokens(prompt.input_ids),
        taps,
        list(prompt.embedding_ranges),
        {name: value.astype(np.float32) for name, value in values.items()},
        row_states=lambda row: injected[taps[row]],
    )
