"""Maps of hidden states: one number per tap (named hidden state) and token, computed once for all plots and views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from ..comparison import Comparison
from ..comparison.metrics import row_sums
from ..engines.base import Engine
from ..progress import Progress
from ..prompt import Prompt, Range
from ..trace import Trace


@dataclass(frozen=True)
class Metric:
    """What the numbers of a map are, and how they are shown.

    Attributes:
        title: what a number is, in words.
        scale: "log" or "linear".
        low, high: ends of the colour scale; None takes them from the numbers.
        palette: name of a matplotlib colour map.
        unit: appended to a number that is shown as text.
        worst: which of several tokens is drawn if they share a column, the one with the "largest" or the "lowest" number.
    """

    title: str
    scale: Literal["log", "linear"]
    low: float | None
    high: float | None
    palette: str
    unit: str = ""
    worst: Literal["largest", "lowest"] = "largest"


METRICS: Mapping[str, Metric] = {
    "change": Metric("change by the embeddings, |Δ| / |plain|; white: exactly 0", "log", 1e-3, 3.0, "magma_r"),
    "cosine": Metric("cosine with the run without embeddings", "linear", 0.0, 1.0, "viridis", worst="lowest"),
    "norm": Metric("2-norm of the state", "log", None, None, "cividis"),
    "error": Metric("error against the reference, in noise floors", "log", 1 / 64, 64.0, "RdYlBu_r", " noise floors"),
    "read": Metric("attention of the answer's token, mean over heads", "log", 1e-4, 1.0, "magma_r"),
    "rests": Metric("nats that the answer loses without a row", "linear", None, None, "RdBu_r"),
    "lens": Metric("logit lens: probability of the likeliest token", "linear", 0.0, 1.0, "GnBu", worst="lowest"),
}


_LENS_BYTES = 256 << 20
"""Bytes of the logits that the logit lens computes at a time: those of 8,192 tokens would take 3.2 GB."""


@dataclass
class StateMaps:
    """Maps of one run, one per metric.

    Attributes:
        tokens: the text of each token of the prompt.
        taps: names of the hidden states, the rows of the maps, from the first layer up.
        ranges: embedding ranges of the run.
        values: `{metric: float32 [taps, tokens]}`; the keys are those of `METRICS` that were computed. NaN: not computed there;
            infinity (for a metric whose worst number is the lowest: minus infinity): the state contains NaN or infinity.
        failures: tokens at which the verdict of `add_error` failed at any tap.
        words: text of the logit lens' likeliest token at each tap and token, `[taps][tokens]`; empty before `add_lens`.
        row_states: function from a row of the maps to its states `[tokens, hidden]`; None if states are not kept.
    """

    tokens: Sequence[str]
    taps: Sequence[str]
    ranges: Sequence[Range]
    values: dict[str, np.ndarray]
    words: list[list[str]] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
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
        """Add the map "error": a comparison's errors as multiples of the noise floor; NaN at taps that it does not have.

        Raises:
            ValueError: the comparison is of other tokens, or has none of these taps.
        """
        if comparison.positions.tolist() != list(range(len(self.tokens))):
            raise ValueError(
                f"the comparison has {len(comparison.positions)} positions, the map {len(self.tokens)} tokens: compare all"
            )
        at = {tap: row for row, tap in enumerate(comparison.taps)}
        if not set(at) & set(self.taps):
            raise ValueError(f"the comparison has none of the taps {', '.join(self.taps[:4])}, ...")
        ratios = _worst_if_nan(comparison.ratios.numpy(), "error")
        missing = np.full(len(self.tokens), np.nan)
        rows = [ratios[at[tap]] if tap in at else missing for tap in self.taps]
        self.values["error"] = np.stack(rows).astype(np.float32)
        self.failures = comparison.failing

    def add_lens(self, engine: Engine, progress: Progress | None = None) -> None:
        """Add the map "lens" and `words`: apply the final norm and the head to every state, keep the likeliest token (logit lens).

        Args:
            progress: called with the fraction of taps done.

        Raises:
            ModelError: the engine does not expose its head.
            ValueError: the maps do not keep states.
        """
        if self.row_states is None:
            raise ValueError("these maps have no states: make them with state_maps")
        step = max(_LENS_BYTES // (8 * engine.model.text_config.vocab_size), 1)  # logits and probabilities, float32
        chances = np.empty((len(self.taps), len(self.tokens)), np.float32)
        found: list[list[str]] = []
        for row, tap in enumerate(self.taps):
            states, likeliest = self.row_states(row), []
            for start in range(0, len(states), step):
                logits = engine.logit_lens(states[start : start + step], normed=tap == "norm")
                best = logits.float().softmax(dim=-1).max(dim=-1)
                chances[row, start : start + step] = best.values.cpu().numpy()
                likeliest += best.indices.tolist()
                if progress:
                    progress((row + min(start + step, len(states)) / len(states)) / len(self.taps))
            found.append(engine.model.tokens(likeliest))
        self.values["lens"], self.words = _worst_if_nan(chances, "lens").astype(np.float32), found

    def neighbours(self, row: int, token: int, count: int = 6) -> list[tuple[int, float]]:
        """The tokens whose states at tap number `row` are nearest to that of `token` by cosine: (index, cosine), nearest first.

        Empty if states are not kept.
        """
        if self.row_states is None:
            return []
        states = self.row_states(row).float()
        near = torch.nn.functional.cosine_similarity(states, states[token : token + 1], dim=1)
        near = near.nan_to_num(-torch.inf)
        near[token] = -torch.inf
        order = near.argsort(descending=True)[: min(count, len(near) - 1)].tolist()
        return [(other, float(near[other])) for other in order]


def state_maps(
    engine: Engine, injected: Trace, plain: Trace, prompt: Prompt, known: StateMaps | None = None, same: int = 0
) -> StateMaps:
    """Compute the maps "change", "cosine" and "norm" for all taps that both traces have, but logits only if there is nothing else.

    Args:
        engine: the engine of the traces, for its tokenizer.
        injected: the trace of `prompt`, with all tokens.
        plain: the trace of `prompt.without_embeddings`, with all tokens.
        known: earlier maps of the same tokens and taps, whose first `same` tokens have the same states in both traces.
    """
    shared = [tap for tap in injected if tap in plain]
    taps = [tap for tap in shared if tap != "logits"] or shared
    if known is None or list(known.taps) != taps or len(known.tokens) != len(prompt):
        known, same = None, 0
    values = {name: np.empty((len(taps), len(prompt))) for name in ("change", "cosine", "norm")}
    for row, tap in enumerate(taps):
        sums = row_sums(injected[tap][same:], plain[tap][same:])
        values["change"][row, same:] = sums.relative.numpy()
        values["cosine"][row, same:] = sums.cosine.numpy()
        values["norm"][row, same:] = sums.state.numpy()
    for name, array in values.items():
        if known is not None:
            array[:, :same] = known.values[name][:, :same]
    return StateMaps(
        engine.model.tokens(prompt.input_ids) if known is None else known.tokens,
        taps,
        list(prompt.embedding_ranges),
        {name: _worst_if_nan(value, name).astype(np.float32) for name, value in values.items()},
        row_states=lambda row: injected[taps[row]],
    )


def comparison_maps(comparison: Comparison, tokens: Sequence[str], ranges: Sequence[Range]) -> StateMaps:
    """The map "error" of a comparison alone, over its own taps and positions.

    `tokens` are the texts of all tokens of the prompt, `ranges` its embedding ranges.
    """
    shown = [tokens[int(position)] for position in comparison.positions]
    ratios = _worst_if_nan(comparison.ratios.numpy(), "error").astype(np.float32)
    return StateMaps(shown, comparison.taps, comparison.columns(ranges), {"error": ratios}, failures=comparison.failing)


def _worst_if_nan(values: np.ndarray, metric: str) -> np.ndarray:
    """Replace NaN and infinities, which come from states that are not finite, by the metric's worst number."""
    return np.where(np.isfinite(values), values, np.inf if METRICS[metric].worst == "largest" else -np.inf)
