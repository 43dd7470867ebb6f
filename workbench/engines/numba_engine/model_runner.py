"""The model runner: packs scheduled chunks into a batch, runs the decoder (eagerly or as a CUDA graph), and returns its results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from range_kernels import PagedPlan

from ...models import Model
from .batch import Batch, DecoderInputs
from .cuda_graphs import CUDAGraphRunner, DecodeResult
from .decode_step import DecodeStep
from .decoder import Decoder, Tap
from .model_cache import ModelCache
from .request import Request
from .rope import Rope, choose_axes
from .token_choice import choose_tokens, chooses_likeliest

_MAX_PINNED = 64 << 20  # bytes of pinned memory for one copy


class Chunk(NamedTuple):
    """Tokens `[start, stop)` of a request, to run in one forward pass."""

    request: Request
    start: int
    stop: int


class StepResult(NamedTuple):
    """What a step computed for one chunk.

    Attributes:
        token: the next token, chosen on the GPU; -1 if the logits contain NaN. None if it must be chosen from `logits`.
        logits: `[rows, vocab]` of the chunk's last token, or of all its tokens if the request wants the states of its prompt; float32 on
            the CPU. None if `token` is enough.
        hidden: `[rows, hidden]` after the final norm.
    """

    token: int | None
    logits: torch.Tensor | None
    hidden: torch.Tensor | None


class ModelRunner:
    """Owns the decoder and its CUDA graphs, and runs every forward pass.

    Attributes:
        decoder: weights and layers.
        graphs: replays decode steps as CUDA graphs; None runs every step eagerly.
    """

    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device, deterministic: bool = False) -> None:
        self.decoder = Decoder(model, dtype, device, deterministic)
        self.graphs: CUDAGraphRunner | None = None

    def capture_decode_steps(self, pages: ModelCache) -> None:
        """Replay decode steps over `pages` as CUDA graphs from now on, if this model, dtype and device support it."""
        if CUDAGraphRunner.supported(self.decoder, pages):
            self.graphs = CUDAGraphRunner(pages)

    def step(self, chunks: Sequence[Chunk], pages: ModelCache) -> list[StepResult]:
        """Run the forward pass of one scheduled step; keys and values are written into `pages`.

        A deterministic engine runs decoding requests and prompts one after the other: their attention kernels differ.
        """
        decoding = [chunk.request.generated_at(chunk.start) is not None for chunk in chunks]
        if self.decoder.deterministic and any(decoding) and not all(decoding):
            parts = {kind: iter(self.step(_of_kind(chunks, decoding, kind), pages)) for kind in (True, False)}
            return [next(parts[kind]) for kind in decoding]
        decoded = self._launch_graph(chunks, pages, None)
        if decoded is None:
            return self._eager_step(chunks, pages)
        return self._results(chunks, decoded.tokens(), decoded.logits, decoded.hidden, [1] * len(chunks))

    def launch(
        self, chunks: Sequence[Chunk], pages: ModelCache, after: Sequence[int] | None = None
    ) -> DecodeResult | None:
        """Launch a decode step of requests that need no more than their next tokens, without waiting for it.

        Args:
            after: for each chunk the row of the step before, whose tokens are not known yet, that chooses its token.

        Returns:
            the step; None if it must be run by `step`.
        """
        generations = [chunk.request.generation for chunk in chunks]
        if any(each is None or each.needs_logits or each.wants_all_states for each in generations):
            return None
        return self._launch_graph(chunks, pages, after)

    def _launch_graph(
        self, chunks: Sequence[Chunk], pages: ModelCache, after: Sequence[int] | None
    ) -> DecodeResult | None:
        graphs = self.graphs
        # Not if `run_batch` was replaced by one that changes batches (`faults/inject.py`).
        if graphs is None or graphs.pages is not pages or "run_batch" in vars(self):
            return None
        step = DecodeStep.of(chunks, pages.page_size, after)
        if step is None or (after is not None and not graphs.ready(self.decoder, step)):
            return None
        # Of a token that is computed again, after a preemption, the next one is known.
        ends = [after is not None or chunk.stop == len(chunk.request) for chunk in chunks]
        states = [chunk.request.generation if end else None for chunk, end in zip(chunks, ends, strict=True)]
        ahead = 0 if after is None else 1
        choose = None if chooses_likeliest(states, ahead) else partial(choose_tokens, states=states, ahead=ahead)
        decoded = graphs.launch(self.decoder, step, choose)
        if decoded is None:
            self.graphs = None  # capturing failed, and a warning was issued
        return decoded

    @torch.no_grad()
    def _eager_step(self, chunks: Sequence[Chunk], pages: ModelCache) -> list[StepResult]:
        hidden = self.forward(chunks, pages)
        rows, end = [], 0
        for chunk in chunks:
            end += chunk.stop - chunk.start
            rows.append(slice(end - (chunk.stop - chunk.start if chunk.request.wants_prompt_states else 1), end))
        needed = torch.cat([hidden[each] for each in rows])
        sizes = [each.stop - each.start for each in rows]
        logits = self.decoder.logits(needed)
        if self.decoder.device.type != "cuda":
            parts = zip(logits.split(sizes), needed.split(sizes), strict=True)
            return [StepResult(None, *part) for part in parts]
        last = logits[(np.cumsum(sizes) - 1).tolist()]
        best = last.max(dim=1)
        likeliest = torch.where(best.values.isnan(), -1, best.indices)
        # Of a chunk that does not end its prompt the token is dropped, so nothing is chosen.
        states = [chunk.request.generation if chunk.stop == len(chunk.request) else None for chunk in chunks]
        return self._results(chunks, choose_tokens(last, likeliest, states).tolist(), logits, needed, sizes)

    def _results(
        self,
        chunks: Sequence[Chunk],
        tokens: list[int],
        logits: torch.Tensor,
        hidden: torch.Tensor,
        sizes: list[int],
    ) -> list[StepResult]:
        """Copy the rows to the host that requests need beside the likeliest token: one copy for all of them."""
        generations = [chunk.request.generation for chunk in chunks]
        needs = [each is None or each.needs_logits or each.wants_all_states for each in generations]
        if not any(needs):
            return [StepResult(token, None, None) for token in tokens]
        whole = all(needs)
        chosen = torch.repeat_interleave(torch.tensor(needs), torch.tensor(sizes)).to(logits.device)
        rows, states = (logits, hidden.clone()) if whole else (logits[chosen], hidden[chosen])
        # The states of a prompt are kept until its last chunk, too long for pinned memory.
        keeps_states = any(chunk.request.wants_prompt_states for chunk in chunks)
        on_host = rows.float().cpu() if keeps_states else _to_host(rows.float())
        wanted = [size for size, need in zip(sizes, needs, strict=True) if need]
        parts = zip(on_host.split(wanted), states.split(wanted), strict=True)
        return [
            StepResult(None, *next(parts)) if need else StepResult(token, None, None)
            for token, need in zip(tokens, needs, strict=True)
        ]

    def run_alone(
        self,
        requests: Sequence[Request],
        steps: Sequence[Sequence[tuple[int, int, int]]],
        page_size: int,
        tap: Tap | None = None,
    ) -> list[torch.Tensor]:
        """Run requests in newly allocated KV pages, without scheduler and prefix cache. Their `pages` are overwritten.

        Args:
            steps: for each forward pass its chunks, as (index into `requests`, start, stop).
            page_size: tokens per page.
            tap: as in `forward`.

        Returns:
            for each request the hidden states after the final norm of its last chunk, `[tokens, hidden]`.
        """
        first = 0
        for request in requests:
            count = -(-len(request) // page_size)
            request.pages = list(range(first, first + count))
            first += count
        for slot, request in enumerate(requests):
            request.slot = slot
        pages = self.decoder.new_pages(first, page_size, len(requests))
        last: dict[int, torch.Tensor] = {}
        for step in steps:
            hidden = self.forward([Chunk(requests[number], start, stop) for number, start, stop in step], pages, tap)
            parts = hidden.split([stop - start for _, start, stop in step])
            last |= {number: part for (number, _, _), part in zip(step, parts, strict=True)}
        return [last[number] for number in range(len(requests))]

    @torch.no_grad()
    def forward(self, chunks: Sequence[Chunk], pages: ModelCache, tap: Tap | None = None) -> torch.Tensor:
        """Run the chunks' tokens through all layers; their keys and values are written into `pages`.

        Args:
            tap: called as `tap(name, state)` with every named hidden state `[tokens, width]`; it must copy what it keeps. With a
                tap the pass runs eagerly.

        Returns:
            `[tokens, hidden]` after the final norm; valid until the next call.
        """
        decoder = self.decoder
        batch = Batch.of(chunks, decoder.table, pages.page_size, mrope=bool(decoder.config.mrope))
        return self.run_batch(batch, pages, tap)

    @torch.no_grad()
    def run_batch(self, batch: Batch, pages: ModelCache, tap: Tap | None = None) -> torch.Tensor:
        """`forward` for a batch that is already built. Separate so that fault injection can change the batch (`faults/inject.py`)."""
        return self.decoder.run_layers(self.decoder_inputs(batch, pages), pages, tap)

    def decoder_inputs(self, batch: Batch, pages: ModelCache) -> DecoderInputs:
        """A batch as the layers use it."""
        config = self.decoder.config
        return DecoderInputs(
            hidden=batch.hidden,
            rotations={rope: self._rotation(rope, batch) for rope in set(config.ropes) if rope is not None},
            key_starts={window: batch.key_start(window) for window in set(config.windows)},
            key_stop=batch.key_stop,
            plan=PagedPlan(
                batch.block_table, batch.cu_seqlens_q, batch.seq_lens, pages, config.heads, self._invariant(batch)
            ),
            deepstack=batch.deepstack,
            query_scale=self._query_scale(batch),
            sequences=batch.sequences() if config.delta_net is not None else None,
        )

    def _invariant(self, batch: Batch) -> Literal["", "prefill", "decode"]:
        if not self.decoder.deterministic or self.decoder.device.type == "cpu":
            return ""
        return "decode" if batch.decodes else "prefill"

    def _query_scale(self, batch: Batch) -> torch.Tensor | None:
        scale = self.decoder.config.query_scale
        if scale is None:
            return None
        positions = batch.positions if scale.rotary else batch.query_positions
        return torch.from_numpy(scale.of(positions.numpy())).to(self.decoder.device)

    def _rotation(self, rope: Rope, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the batch's tokens, float32 `[tokens, pairs]`."""
        cosine, sine = rope.rotation(batch.positions, batch.rope_lengths, self.decoder.device)
        if batch.positions.ndim == 2:
            sections, interleaved = self.decoder.config.mrope, self.decoder.config.interleaved_mrope
            cosine, sine = choose_axes(cosine, sections, interleaved), choose_axes(sine, sections, interleaved)
        return cosine, sine


def _of_kind(chunks: Sequence[Chunk], decoding: Sequence[bool], kind: bool) -> list[Chunk]:
    return [chunk for chunk, each in zip(chunks, decoding, strict=True) if each is kind]


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """Copy to the CPU, through pinned memory unless that would pin too much of the system's memory."""
    if x.nbytes > _MAX_PINNED:
        return x.cpu()
    out = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)  # PyTorch caches and reuses pinned memory
    out.copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return out
