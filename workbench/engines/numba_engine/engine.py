"""The Numba engine: the decoder behind the workbench's engine interface, one request a call."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from range_kernels import splice, visible_keys

from ...batches import plan_batch
from ...models import Model
from ...prompt import Prompt
from ...taps import decoder_taps
from ..api import Engine, parse_device, parse_dtype
from ..messages import Capabilities, EngineOutput, GenerationConfig
from ..sampling import generate, stop_tokens
from .decoder import Decoder, Tap
from .kv_cache import PackedCache

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

    @torch.no_grad()
    def prefill_packed(self, prompts: Sequence[Prompt], max_tokens: int = 2048) -> list[torch.Tensor]:
        """Run several prompts packed end to end, no padding, by `plan_batch(prompts, max_tokens)`.

        Returns:
            for each prompt the hidden state of its last token after the final norm, `[hidden]`, which predicts the first new one.

        Raises:
            PromptError: a prompt that cannot run; none has run then.
        """
        for prompt in prompts:
            self.check(prompt)
        plan = plan_batch(prompts, max_tokens)
        runs = [_Run(self.decoder, prompt, len(prompt)) for prompt in prompts]
        states = [run.embed() for run in runs]
        last: dict[int, torch.Tensor] = {}
        for chunk in plan.chunks:
            mine = [(runs[piece.prompt], states[piece.prompt], slice(piece.start, piece.stop)) for piece in chunk]
            low, reach = (torch.cat([run.visible[bound][part] for run, _, part in mine]) for bound in (0, 1))
            hidden = self.decoder.forward(
                torch.cat([state[part] for _, state, part in mine]),
                torch.cat([run.positions[part] for run, _, part in mine]),
                low,
                reach,
                PackedCache([run.cache for run, _, _ in mine], [len(piece) for piece in chunk]),
            )
            for piece, rows in zip(chunk, hidden.split([len(piece) for piece in chunk]), strict=True):
                last[piece.prompt] = rows[-1]
        return [last[number] for number in range(len(prompts))]


class _Run:
    """One request: its cache and where its next token goes."""

    def __init__(self, decoder: Decoder, prompt: Prompt, capacity: int) -> None:
        self.decoder, self.prompt = decoder, prompt
        self.cache = decoder.new_cache(capacity)
        positions = prompt.position_ids
        self.positions = torch.arange(len(prompt)) if positions is None else positions
        self.next_position = int(self.positions.max()) + 1
        low, reach = visible_keys(len(prompt), prompt.bidirectional)
        self.visible = torch.from_numpy(low), torch.from_numpy(reach)

    @torch.no_grad()
    def hidden(self, tap: Tap | None = None) -> torch.Tensor:
        """Run the whole prompt; `[seq, hidden]` after the final norm."""
        return self.decoder.forward(self.embed(), self.positions, *self.visible, self.cache, tap)

    def embed(self) -> torch.Tensor:
        """Hidden state 0 of the whole prompt, `[seq, hidden]`."""
        prompt = self.prompt
        ids = torch.tensor(prompt.lookup_ids)
        return splice(ids, self.decoder.table, prompt.input_embeddings, prompt.embedding_ranges)

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
