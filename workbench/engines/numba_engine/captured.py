"""Decode steps as CUDA graphs: the host hands the GPU a step at once instead of its thousand kernels one by one."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from range_kernels import KVPages, PagedPlan, StandingPlan

from .decoder import Decoder, Inputs


@dataclass
class _Graph:
    """A captured step: written to before it is replayed, read after."""

    inputs: Inputs
    graph: torch.cuda.CUDAGraph
    out: torch.Tensor  # [room for sequences, hidden]


class CapturedSteps:
    """The decode steps of one decoder over one set of pages.

    There is a graph for each power of two of sequences and of the decode kernel's items, made when a step first needs it; a step
    replays the smallest that has room for it. What stands in rows without a sequence is computed with the others and dropped.
    Weights or settings that are put in the place of others are noticed: graphs of the others are given up.

    A graph is made while other threads may launch work on the GPU; CUDA does not let them wait for the whole device, nor PyTorch
    draw random numbers there, in that instant.
    """

    def __init__(self, pages: KVPages, context: int) -> None:
        self.pages = pages
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._parts: list[object] = []
        self._addresses: list[int] = []
        self._stream = torch.cuda.Stream(pages.device)
        self._most_pages = min(-(-context // pages.page_size), pages.pages)

    @staticmethod
    def possible(decoder: Decoder, pages: KVPages) -> bool:
        """Whether this decoder's decode steps run without asking the host."""
        return StandingPlan.possible(pages, decoder.backbone.heads, decoder.backbone.scale)

    def fits(self, inputs: Inputs, pages: KVPages) -> bool:
        """Whether such a step is one that is replayed: a token of each sequence, over the pages that graphs were made for."""
        return pages is self.pages and inputs.plan.most_queries == 1 and not inputs.deepstack

    def run(self, decoder: Decoder, inputs: Inputs) -> torch.Tensor:
        """What `decoder.run_layers` returns, `[sequences, hidden]`; the next call writes over it."""
        self._notice(decoder)
        plan = inputs.plan
        assert isinstance(plan, PagedPlan)
        key = (_power_of_two(plan.queries), _power_of_two(plan.items))
        captured = self._graphs.get(key)
        if captured is not None:
            _write(captured.inputs, inputs)
        else:
            captured = self._make(decoder, *key, inputs)
            if captured is None:
                return decoder.run_layers(inputs, self.pages)
            self._graphs[key] = captured
        captured.graph.replay()
        return captured.out[: plan.queries]

    def _notice(self, decoder: Decoder) -> None:
        parts = decoder.parts()
        addresses = [part.data_ptr() for part in parts if isinstance(part, torch.Tensor)]  # `.data` may be set
        same = len(parts) == len(self._parts) and all(a is b for a, b in zip(parts, self._parts, strict=True))
        if not same or addresses != self._addresses:
            self._graphs.clear()
            self._parts, self._addresses = parts, addresses

    def _make(self, decoder: Decoder, sequences: int, items: int, inputs: Inputs) -> _Graph | None:
        """A graph that holds the step of `inputs`; None, and none from now on, where it cannot be made."""
        for _ in range(2):
            try:
                return self._capture(decoder, sequences, items, inputs)
            except RuntimeError as error:  # such as too little memory
                said = str(error)  # not the error, whose traceback holds what has been made so far
            torch.cuda.empty_cache()
        decoder.captured = None
        self._graphs.clear()
        warnings.warn(
            f"decode steps run without CUDA graphs from here on: {said}; eager_mode=True asks for none", stacklevel=2
        )
        return None

    # Tensors made in the caller's inference mode could not be written to outside it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, decoder: Decoder, sequences: int, items: int, inputs: Inputs) -> _Graph:
        def room(x: torch.Tensor) -> torch.Tensor:
            return torch.zeros((sequences, *x.shape[1:]), dtype=x.dtype, device=x.device)

        standing = Inputs(
            hidden=room(inputs.hidden),
            rotations={rope: (room(cosine), room(sine)) for rope, (cosine, sine) in inputs.rotations.items()},
            lows={window: room(low) for window, low in inputs.lows.items()},
            reach=room(inputs.reach),
            plan=StandingPlan(sequences, self._most_pages, items, self.pages, decoder.backbone.heads),
            deepstack=[],
        )
        _write(standing, inputs)
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()  # one ends with its last graph, be that one that failed
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self.pages.device))
        with torch.cuda.stream(self._stream):
            try:
                decoder.run_layers(standing, self.pages)  # what first calls set up cannot be captured
                self._stream.synchronize()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    out = decoder.run_layers(standing, self.pages)
                finally:
                    graph.capture_end()
            finally:
                self._stream.synchronize()  # whatever happens: what it reads may be given up now
        return _Graph(standing, graph, out)


def _write(standing: Inputs, inputs: Inputs) -> None:
    """A step's inputs, to where its graph reads them."""
    assert isinstance(standing.plan, StandingPlan)
    assert isinstance(inputs.plan, PagedPlan)
    standing.plan.take(inputs.plan)
    pairs = [(standing.hidden, inputs.hidden), (standing.reach, inputs.reach)]
    pairs += [(standing.lows[window], low) for window, low in inputs.lows.items()]
    for rope, rotation in inputs.rotations.items():
        pairs += zip(standing.rotations[rope], rotation, strict=True)
    for into, given in pairs:
        into[: len(given)].copy_(given)


def _power_of_two(count: int) -> int:
    """The smallest that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()
