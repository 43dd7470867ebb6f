"""Experts that rounding may choose otherwise: where a router's choice is that close, neither expert is wrong.

A router chooses the experts with the k highest scores. Its choice is undecided if the scores of rank k and k + 1 differ by less than
their rounding errors. The noise floor then includes a run of the reference in which all undecided choices are exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engines.transformers.routers import Exchange, RouterRead


@dataclass(frozen=True)
class ExpertChoice:
    """A token at which rounding decides between two experts.

    Attributes:
        layer, token: where.
        margin: difference between the scores of the two experts in the reference's float64 run.
        noise: the largest error of that token's scores in the engine's dtype.
    """

    layer: int
    token: int
    margin: float
    noise: float

    @classmethod
    def from_json(cls, record: Any) -> ExpertChoice:
        """The inverse of `dataclasses.asdict`; raises TypeError or ValueError for anything else."""
        choice = cls(**record)
        numbers = (choice.margin, choice.noise)
        if (
            type(choice.layer) is not int
            or type(choice.token) is not int
            or not all(type(each) is float for each in numbers)
        ):
            raise ValueError(f"{record} is not an expert choice")
        return choice

    def __str__(self) -> str:
        return f"expert choice flips at layer {self.layer}, token {self.token}: margin {self.margin:.0e}, noise {self.noise:.0e}"


_MARGIN = 4.0
"""A choice is undecided if the two scores differ by up to this multiple of the scores' largest error in four runs: each may be off by
twice that error. A larger multiple would hide wrong experts: every undecided token has a floor as large as the states themselves."""


def undecided_choices(
    exact: Mapping[int, RouterRead], runs: Sequence[Mapping[int, RouterRead]]
) -> tuple[list[ExpertChoice], dict[int, Exchange]]:
    """Find the choices that rounding can change, from the reference's routers in float64 and in the engine's dtype.

    Returns:
        the choices, and for each layer the exchanges that change them all. If a router's scores are not known (`RouterRead`), its
        undecided choices are those that differed between the runs.
    """
    choices, exchanges = [], {}
    for layer, read in exact.items():
        others = [run[layer] for run in runs if layer in run]
        count = read.chosen.shape[1]
        if read.scores is None or any(other.scores is None for other in others):
            margin, noise, rivals = _seen(read, others)
        else:
            errors = torch.stack([(other.scores - read.scores).abs().amax(dim=1) for other in others]).amax(dim=0)  # type: ignore[operator]
            noise = torch.maximum(errors, errors.median())
            best = read.scores.topk(count + 1, dim=1)
            margin, rivals = best.values[:, count - 1] - best.values[:, count], best.indices[:, count]
        tokens = (margin <= _MARGIN * noise).nonzero().flatten()
        choices += [ExpertChoice(layer, int(at), float(margin[at]), float(noise[at])) for at in tokens]
        if len(tokens):
            exchanges[layer] = Exchange(tokens, rivals[tokens])
    return choices, exchanges


def _seen(read: RouterRead, others: Sequence[RouterRead]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Margin 0 where a run chose another expert, infinity elsewhere; noise 0; and the expert that it chose."""
    margin = torch.full((len(read.chosen),), torch.inf, dtype=torch.float64)
    rivals = read.chosen[:, 0].clone()
    for other in others:
        for token in range(len(read.chosen)):
            added = set(other.chosen[token].tolist()) - set(read.chosen[token].tolist())
            if added:
                margin[token], rivals[token] = 0.0, min(added)
    return margin, torch.zeros_like(margin), rivals
