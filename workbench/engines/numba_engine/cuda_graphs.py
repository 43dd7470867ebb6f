"""Decode steps as CUDA graphs: embedding, layers, head and choice of the likeliest token are one launch; only token ids come back.

host: ids, positions, pages -> one copy to the GPU -> graph: embedding, layers, head, argmax -> ids in pinned memory

A step's tokens also stay on the GPU, so that the next step can be launched before they are known on the host.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from range_kernels import CUDAGraphPlan

from .decode_step import DecodeStep, StepInputs
from .decoder import Decoder
from .model_cache import ModelCache

Choose = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class DecodeResult:
    """A step that was launched.

    Attributes:
        logits: `[sequences, vocab]`, on the GPU; valid until the next step is launched.
        hidden: `[sequences, hidden]` after the final norm, on the GPU; valid as long.
    """

    def __init__(
        self, tokens: torch.Tensor, done: torch.cuda.Event, logits: torch.Tensor, hidden: torch.Tensor
    ) -> None:
        self._tokens, self._done, self.logits, self.hidden = tokens, done, logits, hidden

    def tokens(self) -> list[int]:
        """Wait for the step, and return the chosen token of each request; -1 if its logits contain NaN."""
        self._done.synchronize()
        return self._tokens.tolist()


@dataclass
class _Graph:
    """A captured step: `inputs` are written before a replay, the rest is read after it."""

    inputs: StepInputs
    graph: torch.cuda.CUDAGraph
    hidden: torch.Tensor  # [sequences, hidden]
    logits: torch.Tensor  # [sequences, vocab]
    tokens: torch.Tensor  # int64 [sequences], on the GPU


class CUDAGraphRunner:
    """Runs the decode steps of one decoder over one KV cache as CUDA graphs.

    A graph is captured for each triple (number of sequences, pages of the longest one, number of KV splits of the decode kernel), each
    rounded up, when a step first needs it. Unused rows of a graph are computed and dropped. If weights or settings of the decoder are
    replaced, all graphs are discarded.

    During a capture other threads may launch work on the GPU, but CUDA forbids them to synchronise the whole device, and PyTorch to
    draw random numbers on it.

    Args:
        pages: the KV cache.
    """

    def __init__(self, pages: ModelCache) -> None:
        self.pages = pages
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._parts: list[object] = []
        self._addresses: list[int] = []
        self._logits: torch.Tensor | None = None  # of all graphs: each would keep megabytes
        self._chosen: torch.Tensor | None = None  # int64 [rows]: the tokens of the last step, for the next one
        self._stream = torch.cuda.Stream(pages.device)

    @staticmethod
    def supported(decoder: Decoder, pages: ModelCache) -> bool:
        """Whether decode steps over `pages` can be captured as CUDA graphs.

        They must run on the tensor-core decode kernel, and no expert's number of rows may be needed on the host.
        """
        if decoder.config.delta_net is not None:
            return False
        if any(layer.mixture is not None and not layer.mixture.experts.grouped for layer in decoder.layers):
            return False
        return CUDAGraphPlan.supported(pages, decoder.config.heads, decoder.config.scale)

    def launch(self, decoder: Decoder, step: DecodeStep, choose: Choose | None = None) -> DecodeResult | None:
        """Launch a step, without waiting for it. At most one step may be under way whose tokens were not read.

        Args:
            choose: called as `choose(logits, likeliest)` after the graph, chooses other tokens than the likeliest; it may not wait for
                the GPU.

        Returns None if capturing failed, after a warning: the caller must run the step eagerly.
        """
        self._discard_stale_graphs(decoder)
        key, splits = self._key(decoder, step)
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._try_capture(decoder, key, step, splits)
            if captured is None:
                return None
            self._graphs[key] = captured
        captured.inputs.write(step, splits)
        captured.graph.replay()
        count, done = len(step.ids), torch.cuda.Event()
        tokens = torch.empty(count, dtype=torch.int64, pin_memory=True)  # PyTorch caches pinned memory
        next_tokens = captured.tokens[:count]
        if choose is not None:
            next_tokens = choose(captured.logits[:count], next_tokens)
            assert self._chosen is not None
            self._chosen[:count] = next_tokens.clamp(min=0)  # NaN: the step that takes the token is dropped
        tokens.copy_(next_tokens, non_blocking=True)
        done.record()
        return DecodeResult(tokens, done, captured.logits[:count], captured.hidden[:count])

    def ready(self, decoder: Decoder, step: DecodeStep) -> bool:
        """Whether a step's graph is captured. Capturing runs the step once, and overwrites the tokens that a step launched ahead takes."""
        self._discard_stale_graphs(decoder)
        return self._key(decoder, step)[0] in self._graphs

    def _key(self, decoder: Decoder, step: DecodeStep) -> tuple[tuple[int, int, int], np.ndarray]:
        """The largest step that the graph of a step takes, and the step's KV splits."""
        splits = CUDAGraphPlan.kv_splits_of(step.seq_lens, self.pages, decoder.config.heads, decoder.deterministic)
        longest, sequences = max(map(len, step.pages)), _batch_size(len(step.ids))
        # Few variants, so that few graphs are captured: unused splits cost little.
        return (sequences, max(_power_of_two(longest), 16), _power_of_two(max(len(splits), 2 * sequences))), splits

    def _discard_stale_graphs(self, decoder: Decoder) -> None:
        parts = decoder.parts()
        addresses = [part.data_ptr() for part in parts if isinstance(part, torch.Tensor)]  # `.data` may be replaced
        same = len(parts) == len(self._parts) and all(a is b for a, b in zip(parts, self._parts, strict=True))
        if not same or addresses != self._addresses:
            self._graphs.clear()
            self._parts, self._addresses = parts, addresses

    def _try_capture(
        self, decoder: Decoder, key: tuple[int, int, int], step: DecodeStep, splits: np.ndarray
    ) -> _Graph | None:
        """Capture the step; if that fails, discard all graphs, warn and return None."""
        for _ in range(2):
            try:
                return self._capture(decoder, key, step, splits)
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
    def _capture(self, decoder: Decoder, key: tuple[int, int, int], step: DecodeStep, splits: np.ndarray) -> _Graph:
        sequences = key[0]
        inputs = StepInputs(*key, decoder, self.pages)
        logits, chosen = self._outputs(sequences, decoder)
        tokens = torch.zeros(sequences, dtype=torch.int64, device=self.pages.device)

        def run() -> torch.Tensor:
            ids = inputs.ids.long()
            ids = torch.where(ids < 0, chosen[(-1 - ids).clamp(min=0)], ids)
            hidden = decoder.run_layers(inputs.inputs(F.embedding(ids, decoder.table)), self.pages)
            logits.copy_(decoder.logits(hidden))
            best = logits.max(dim=1)
            tokens.copy_(torch.where(best.values.isnan(), -1, best.indices))
            chosen[:sequences] = best.indices
            return hidden

        if not self._graphs:
            # A memory pool is freed with its last graph, also after a failed capture: it must not be used again.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self.pages.device))
        with torch.cuda.stream(self._stream):
            try:
                inputs.write(step, splits)
                run()  # warm-up: the one-time setup of first calls cannot be captured
                self._stream.synchronize()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    hidden = run()
                finally:
                    graph.capture_end()
            finally:
                self._stream.synchronize()  # also after an error, before tensors that the stream reads are freed
        return _Graph(inputs, graph, hidden, logits, tokens)

    def _outputs(self, sequences: int, decoder: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of `sequences` rows, and the chosen tokens of all rows, which all graphs write to.

        If they must grow, graphs that write to the old ones are discarded.
        """
        if self._logits is None or self._chosen is None or len(self._logits) < sequences:
            self._graphs.clear()
            rows, device = max(sequences, 64), self.pages.device
            self._logits = torch.empty((rows, decoder.config.vocab), dtype=decoder.dtype, device=device)
            self._chosen = torch.zeros(rows, dtype=torch.int64, device=device)
        return self._logits[:sequences], self._chosen


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def _batch_size(count: int) -> int:
    """The number of rows of a graph: a power of two up to 8, then a multiple of 8."""
    return _power_of_two(count) if count <= 8 else -(-count // 8) * 8
