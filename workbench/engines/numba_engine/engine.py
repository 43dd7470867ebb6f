"""The Numba engine: the decoder behind the workbench's engine interface, one request a call."""

from __future__ import annotations

from collections.abc import Generator

import torch
from range_kernels import splice, visible_keys

from ...models import Model
from ...prompt import Prompt
from ...taps import decoder_taps
from ..api import Engine, parse_device, parse_dtype
from ..messages import Capabilities, EngineOutput, GenerationConfig
from ..sampling import generate, stop_tokens
from .decoder import Decoder, Tap

DTYPES = ("float32", "bfloat16", "float16")


class NumbaEngine(Engine):
    """An independent Llama decoder over `range_kernels`, on the CPU or a GPU; it gives every tap.

    Requests share the weights and nothing else, so calls from several threads do not disturb each other.
    """

    def __init__(self, model: Model, *, dtype: str | torch.dtype = "float32", device: str = "cpu") -> None:
        super().__init__()
        self.model = model
        self.dtype = parse_dtype(dtype, DTYPES, "numba")
        self.device = parse_device(device, "numba")
        self.decoder = Decoder(model, self.dtype, self.device)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("numba", decoder_taps(len(self.decoder.layers)), DTYPES, ("cpu", "cuda"))

    def _generate(self, prompt: Prompt, config: GenerationConfig) -> Generator[EngineOutput, None, None]:
        run = _Run(self.decoder, prompt, len(prompt) + config.max_new_tokens)
        yield from generate(run, prompt, config, stop_tokens(self.model, config))

    def _trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor) -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}
        rows = positions.to(self.device)

        def tap(name: str, state: torch.Tensor) -> None:
            if name in wanted:
                kept[name] = state[rows]

        wanted = set(taps)
        hidden = _Run(self.decoder, prompt, len(prompt)).hidden(tap)
        if "logits" in wanted:
            kept["logits"] = self.decoder.logits(hidden[rows])
        return {name: kept[name] for name in taps}


class _Run:
    """One request: its cache and where its next token goes."""

    def __init__(self, decoder: Decoder, prompt: Prompt, capacity: int) -> None:
        self.decoder, self.prompt = decoder, prompt
        self.cache = decoder.new_cache(capacity)
        positions = prompt.position_ids
        self.positions = torch.arange(len(prompt)) if positions is None else positions
        self.next_position = int(self.positions.max()) + 1

    @torch.no_grad()
    def hidden(self, tap: Tap | None = None) -> torch.Tensor:
        """Run the whole prompt; `[seq, hidden]` after the final norm."""
        prompt, decoder = self.prompt, self.decoder
        ids = torch.tensor(prompt.lookup_ids)
        state = splice(ids, decoder.table, prompt.input_embeddings, prompt.embedding_ranges)
        low, reach = (torch.from_numpy(x) for x in visible_keys(len(prompt), prompt.bidirectional))
        return decoder.forward(state, self.positions, low, reach, self.cache, tap)

    @torch.no_grad()
    def prefill(self, all_logits: bool) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.hidden()
        return self.decoder.logits(hidden if all_logits else hidden[-1:]), hidden

    @torch.no_grad()
    def decode(self, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        decoder, last = self.decoder, self.cache.length
        low, reach = torch.zeros(1, dtype=torch.int32), torch.full((1,), last, dtype=torch.int32)
        positions = torch.tensor([self.next_position])
        self.next_position += 1
        hidden = decoder.forward(decoder.table[token : token + 1], positions, low, reach, self.cache)
        return decoder.logits(hidden), hidden
