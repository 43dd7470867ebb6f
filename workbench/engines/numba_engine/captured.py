"""Decode steps as CUDA graphs: the host hands the GPU a step at once instead of its thousand kernels one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from range_kernels import KVPages, PagedPlan, StandingPlan

from .decoder import Decoder, Inputs


@dataclass
class _Graph:
    """A captured step: written to before it is replayed, read after."""

    inputs: Inputs
    plan: StandingPlan
    graph: torch.cuda.CUDAGraph
    out: torch.Tensor  # [room for sequences, hidden]


class CapturedSteps:
    """The decode steps of a decoder over one set of pages.

    There is a graph for each power of two of sequences and of the decode kernel's items, made when a step first needs it; a step
    replays the smallest that has room for it. Rows without a sequence are computed from zeros and dropped. Weights or settings
    that are put in the place of others are noticed: graphs of the others are given up.
    """

    def __init__(self, decoder: Decoder, pages: KVPages) -> None:
        self.decoder, self.pages = decoder, pages
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._parts: list[Any] = []
        self._stream = torch.cuda.Stream(pages.device)
        self._most_pages = min(-(-decoder.context // pages.page_size), pages.pages)

    @staticmethod
    def possible(decoder: Decoder, pages: KVPages) -> bool:
        """Whether this decoder's decode steps run without asking the host."""
        return StandingPlan.possible(pages, decoder.backbone.heads, decoder.backbone.scale)

    def fits(self, inputs: Inputs, pages: KVPages) -> bool:
        """Whether such a step is one that is replayed: a token of each sequence, over the pages that graphs were made for."""
        plan = inputs.plan
        return pages is self.pages and plan.most_queries == 1 and not inputs.deepstack

    def run(self, inputs: Inputs) -> torch.Tensor:
        """What `Decoder.run_layers` returns, `[sequences, hidden]`; the next call writes over it."""
        parts = _parts(self.decoder)
        if len(parts) != len(self._parts) or any(a is not b for a, b in zip(parts, self._parts, strict=True)):
            self._graphs.clear()
            self._pool = torch.cuda.graph_pool_handle()  # a pool ends with its last graph
            self._parts = parts
        plan = inputs.plan
        assert isinstance(plan, PagedPlan)
        key = (_power_of_two(plan.queries), _power_of_two(plan.items))
        captured = self._graphs.get(key)
        if captured is not None:
            _take(captured, inputs)
        else:
            try:
                captured = self._graphs[key] = self._capture(*key, inputs)
            except RuntimeError as error:  # such as too little memory
                warnings.warn(f"decode steps run without CUDA graphs from here on: {error}", stacklevel=2)
                self.decoder.captured = None
                return self.decoder.run_layers(inputs, self.pages)
        captured.graph.replay()
        return captured.out[: plan.queries]

    def _capture(self, sequences: int, items: int, inputs: Inputs) -> _Graph:
        def room(x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros((sequences, *x.shape[1:]))

        plan = StandingPlan(sequences, self._most_pages, items, self.pages, self.decoder.backbone.heads)
        standing = Inputs(
            hidden=room(inputs.hidden),
            rotations={rope: (room(cosine), room(sine)) for rope, (cosine, sine) in inputs.rotations.items()},
            lows={window: room(low) for window, low in inputs.lows.items()},
            reach=room(inputs.reach),
            plan=plan,
            deepstack=[],
        )
        captured = _Graph(standing, plan, torch.cuda.CUDAGraph(), standing.hidden)
        _take(captured, inputs)
        self._stream.wait_stream(torch.cuda.current_stream(self.pages.device))
        with torch.cuda.stream(self._stream):
            self.decoder.run_layers(standing, self.pages)  # what first calls set up cannot be captured
            self._stream.synchronize()
            # Other threads may use the GPU meanwhile.
            captured.graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                captured.out = self.decoder.run_layers(standing, self.pages)
            finally:
                captured.graph.capture_end()
        return captured


def _take(captured: _Graph, inputs: Inputs) -> None:
    """Write a step's inputs to where its graph reads them."""
    assert isinstance(inputs.plan, PagedPlan)
    captured.plan.take(inputs.plan)
    for into, given in _pairs(captured.inputs, inputs):
        into[: len(given)].copy_(given)


def _pairs(standing: Inputs, inputs: Inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pairs = [(standing.hidden, inputs.hidden), (standing.reach, inputs.reach)]
    pairs += [(standing.lows[window], low) for window, low in inputs.lows.items()]
    for rope, rotation in inputs.rotations.items():
        pairs += zip(standing.rotations[rope], rotation, strict=True)
    return pairs


def _parts(decoder: Decoder) -> list[Any]:
    """All that a graph was made from, by identity."""
    of_layer: Callable[[Any], list[Any]] = lambda layer: [  # noqa: E731
        layer.attention_norm, layer.head_norms, layer.after_attention, layer.mlp_norm, layer.after_mlp,
        *(part for linear in (layer.qkv, layer.output, layer.gate_up, layer.down) for part in (linear.weight, linear.bias)),
    ]  # fmt: skip
    return [decoder.backbone, decoder.norm, *(part for layer in decoder.layers for part in of_layer(layer))]


def _power_of_two(count: int) -> int:
    """The smallest that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()
