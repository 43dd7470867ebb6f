"""Routers of mixtures of experts: read the scores by which experts are chosen, and exchange chosen experts for others.

In Transformers a router returns `(logits [tokens, experts], weights [tokens, k], indices [tokens, k])`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .network import Network


@dataclass(frozen=True)
class RouterRead:
    """What a router did in one run.

    Attributes:
        scores: float64 `[tokens, experts]`; the experts with the largest are chosen. None if the class chooses by another rule than
            those known (`_scores`).
        chosen: int64 `[tokens, k]`.
        weights: `[tokens, k]`.
    """

    scores: torch.Tensor | None
    chosen: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Exchange:
    """For one router: at these tokens the least weighty expert is exchanged for another; both int64 `[tokens]`."""

    tokens: torch.Tensor
    experts: torch.Tensor


class RouterWatch:
    """Reads routers: `passes` has what they did in each pass, by layer. `exchanges`, by layer, change what they choose.

    `earlier` has, by number of the pass, what routers did before the pass was interrupted.
    """

    def __init__(self, exchanges: Mapping[int, Exchange] | None = None) -> None:
        self.passes: list[dict[int, RouterRead]] = []
        self.earlier: dict[int, dict[int, RouterRead]] = {}
        self._exchanges = exchanges or {}

    @contextlib.contextmanager
    def hooks(self, network: Network) -> Iterator[None]:
        """Watch a network for the duration of a pass."""
        reads = dict(self.earlier.get(len(self.passes), {}))
        self.passes.append(reads)

        def after(number: int) -> Any:
            def look(module: nn.Module, args: tuple, output: Any) -> Any:
                if not _is_routing(output):
                    return None
                logits, weights, chosen = output[:3]
                reads[number] = RouterRead(
                    _scores(module, logits.double().cpu(), chosen.cpu()), chosen.cpu(), weights.double().cpu()
                )
                exchange = self._exchanges.get(number)
                if exchange is None:
                    return None
                changed = chosen.clone()
                tokens, experts = exchange.tokens.to(chosen.device), exchange.experts.to(chosen)
                new = (chosen[tokens] != experts[:, None]).all(
                    dim=1
                )  # an exchange in a layer before may have chosen it already
                tokens, experts = tokens[new], experts[new]
                changed[tokens, weights[tokens].argmin(dim=1)] = experts
                return type(output)((logits, weights, changed, *output[3:]))

            return look

        hooks = [module.register_forward_hook(after(number)) for number, module in _routers(network.layers or ())]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def has_routers(module: nn.Module) -> bool:
    """Whether a model seems to have routers."""
    return any(True for _ in _routers([module]))


def _routers(layers: Iterable[nn.Module]) -> Iterator[tuple[int, nn.Module]]:
    for number, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] in ("gate", "router") and not isinstance(module, nn.Linear):
                yield number, module


def _is_routing(output: Any) -> bool:
    return (
        isinstance(output, tuple)
        and len(output) >= 3
        and all(isinstance(each, torch.Tensor) and each.ndim == 2 for each in output[:3])
        and output[2].dtype is torch.int64
        and output[1].shape == output[2].shape
        and output[2].shape[1] < output[0].shape[1]
    )


def _scores(router: nn.Module, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor | None:
    """The scores whose largest are at `chosen`: logits, or their sigmoid or softmax plus a bias per expert (DeepSeek-V3)."""
    own = [*router._parameters.values(), *router._buffers.values()]
    experts = logits.shape[1]
    biases = [each.detach().double().cpu() for each in own if each is not None and tuple(each.shape) == (experts,)]
    rules = [logits] + [rule + bias for bias in biases for rule in (logits.sigmoid(), logits.softmax(dim=1), logits)]
    for scores in rules:
        own_scores = (
            scores.gather(1, chosen).sort(dim=1, descending=True).values
        )  # values, not indices: scores may be equal
        if torch.equal(own_scores, scores.topk(chosen.shape[1], dim=1).values):
            return scores
    return None
