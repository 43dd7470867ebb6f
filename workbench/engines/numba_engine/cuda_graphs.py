"""Decode steps as CUDA graphs: the host launches a whole step at once instead of its thousand kernels one by one."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from range_kernels import CUDAGraphPlan, KVPages, PagedPlan

from .batch import DecoderInputs
from .decoder import Decoder


@dataclass
class _Graph:
    """A captured step: `inputs` are written before a replay, `out` is read after it."""

    inputs: DecoderInputs
    graph: torch.cuda.CUDAGraph
    out: torch.Tensor  # [max sequences, hidden]


class CUDAGraphRunner:
    """Runs the decode steps of one decoder over one KV cache as CUDA graphs.

    A graph is captured for each pair (number of sequences, number of KV splits of the decode kernel), both rounded up to powers of
    two, when a step first needs it. Unused rows of a graph are computed and dropped. If weights or settings of the decoder are
    replaced, all graphs are discarded.

    During a capture other threads may launch work on the GPU, but CUDA forbids them to synchronise the whole device, and PyTorch to
    draw random numbers on it.

    Args:
        pages: the KV cache.
        context: largest number of tokens of a sequence.
    """

    def __init__(self, pages: KVPages, context: int) -> None:
        self.pages = pages
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._parts: list[object] = []
        self._addresses: list[int] = []
        self._stream = torch.cuda.Stream(pages.device)
        self._max_pages = min(-(-context // pages.page_size), pages.pages)

    @staticmethod
    def supported(decoder: Decoder, pages: KVPages) -> bool:
        """Whether decode steps over `pages` can be captured as CUDA graphs: only if they run on the tensor-core decode kernel."""
        return CUDAGraphPlan.supported(pages, decoder.config.heads, decoder.config.scale)

    def fits(self, inputs: DecoderInputs, pages: KVPages) -> bool:
        """Whether this step can run as a graph: one token per sequence, this runner's KV cache object, and no deepstack features."""
        return pages is self.pages and inputs.plan.max_seqlen_q == 1 and not inputs.deepstack

    def run(self, decoder: Decoder, inputs: DecoderInputs) -> torch.Tensor | None:
        """Run a step that `fits`, as `decoder.run_layers` would; return `[sequences, hidden]`, valid until the next call.

        Returns None if capturing failed, after a warning: the caller must run the step eagerly.
        """
        self._discard_stale_graphs(decoder)
        plan = inputs.plan
        assert isinstance(plan, PagedPlan)
        key = (_power_of_two(plan.queries), _power_of_two(plan.kv_splits))
        captured = self._graphs.get(key)
        if captured is not None:
            _write(captured.inputs, inputs)
        else:
            captured = self._try_capture(decoder, *key, inputs)
            if captured is None:
                return None
            self._graphs[key] = captured
        captured.graph.replay()
        return captured.out[: plan.queries]

    def _discard_stale_graphs(self, decoder: Decoder) -> None:
        parts = decoder.parts()
        addresses = [part.data_ptr() for part in parts if isinstance(part, torch.Tensor)]  # `.data` may be replaced
        same = len(parts) == len(self._parts) and all(a is b for a, b in zip(parts, self._parts, strict=True))
        if not same or addresses != self._addresses:
            self._graphs.clear()
            self._parts, self._addresses = parts, addresses

    def _try_capture(self, decoder: Decoder, sequences: int, kv_splits: int, inputs: DecoderInputs) -> _Graph | None:
        """Capture the step of `inputs`; if that fails, discard all graphs, warn and return None."""
        for _ in range(2):
            try:
                return self._capture(decoder, sequences, kv_splits, inputs)
            except RuntimeError as error:  # for example too little memory
                reason = str(error)  # not the error itself: its traceback would keep the failed capture's tensors alive
            torch.cuda.empty_cache()
        self._graphs.clear()
        warnings.warn(
            f"decode steps run without CUDA graphs from here on: {reason}; eager_mode=True turns them off", stacklevel=2
        )
        return None

    # Tensors created in a caller's inference mode could not be written to outside it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, decoder: Decoder, sequences: int, kv_splits: int, inputs: DecoderInputs) -> _Graph:
        def zeros(x: torch.Tensor) -> torch.Tensor:
            return torch.zeros((sequences, *x.shape[1:]), dtype=x.dtype, device=x.device)

        static = DecoderInputs(
            hidden=zeros(inputs.hidden),
            rotations={rope: (zeros(cosine), zeros(sine)) for rope, (cosine, sine) in inputs.rotations.items()},
            key_starts={window: zeros(key_start) for window, key_start in inputs.key_starts.items()},
            key_stop=zeros(inputs.key_stop),
            plan=CUDAGraphPlan(sequences, self._max_pages, kv_splits, self.pages, decoder.config.heads),
            deepstack=[],
        )
        _write(static, inputs)
        if not self._graphs:
            # A memory pool is freed with its last graph, also after a failed capture: it must not be used again.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self.pages.device))
        with torch.cuda.stream(self._stream):
            try:
                decoder.run_layers(static, self.pages)  # warm-up: the one-time setup of first calls cannot be captured
                self._stream.synchronize()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    out = decoder.run_layers(static, self.pages)
                finally:
                    graph.capture_end()
            finally:
                self._stream.synchronize()  # also after an error, before tensors that the stream reads are freed
        return _Graph(static, graph, out)


def _write(static: DecoderInputs, inputs: DecoderInputs) -> None:
    """Copy a step's inputs into the tensors that its graph reads."""
    assert isinstance(static.plan, CUDAGraphPlan)
    assert isinstance(inputs.plan, PagedPlan)
    static.plan.copy_from(inputs.plan)
    pairs = [(static.hidden, inputs.hidden), (static.key_stop, inputs.key_stop)]
    pairs += [(static.key_starts[window], key_start) for window, key_start in inputs.key_starts.items()]
    for rope, rotation in inputs.rotations.items():
        pairs += zip(static.rotations[rope], rotation, strict=True)
    for into, given in pairs:
        into[: len(given)].copy_(given)


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()
