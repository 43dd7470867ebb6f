"""What each layer would have said at every token of an answer, and which ranges that token read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..engines.base import Engine
from ..engines.types import GenerationConfig
from ..errors import ModelError
from ..progress import Progress
from ..prompt import Prompt
from .answers import answer_text, answer_tokens, continued
from .attention import attention_of, key_groups

_LENS = ("embed", "layers.*", "norm")


@dataclass(frozen=True)
class AnswerLens:
    """The logit lens and the attention of the tokens that an answer was chosen at.

    Attributes:
        tokens: ids of the answer; `texts`: their texts.
        taps: "embed", the layers and "norm", from the first up.
        words: for each tap and answer token the text of the token that the lens makes likeliest, `[taps][tokens]`; `likeliest`: its id,
            int64 `[taps, tokens]`.
        chances: its probability, float64 `[taps, tokens]`; `said`: the probability of the token that was generated.
        groups: the groups of the prompt's tokens, as in `Attention`; the answer's own tokens are in "text".
        reads: the share of each group in the attention, mean over heads, float64 `[layers, tokens, groups]`; None if the engine does not
            expose its attention.
        attention: the mean over heads, float32 `[layers, tokens, keys]`, over prompt and answer; None likewise.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    taps: tuple[str, ...]
    words: list[list[str]]
    likeliest: np.ndarray
    chances: np.ndarray
    said: np.ndarray
    groups: tuple[str, ...]
    reads: np.ndarray | None
    attention: np.ndarray | None

    def decided(self, number: int) -> str:
        """The tap from which on every later tap makes the generated token the likeliest; "" if the last does not."""
        found = ""
        for tap, row in zip(reversed(self.taps), self.likeliest[::-1], strict=True):
            if row[number] != self.tokens[number]:
                break
            found = tap
        return found

    def __str__(self) -> str:
        lines = []
        for number, text in enumerate(self.texts):
            line = f"{text!r:16} decided at {self.decided(number) or 'no tap':10}"
            if self.reads is not None:
                half = self.reads[len(self.reads) // 2 :, number].mean(axis=0)
                line += "; upper half reads " + ", ".join(
                    f"{name} {share:.0%}" for name, share in zip(self.groups, half, strict=True)
                )
            lines.append(line)
        return "\n".join(lines)


@torch.no_grad()
def answer_lens(
    engine: Engine,
    prompt: Prompt,
    answer: str | Sequence[int] | None = None,
    *,
    max_tokens: int = 12,
    progress: Progress | None = None,
) -> AnswerLens:
    """Apply the logit lens at every token of an answer, and sum up its attention by range.

    Args:
        engine: "numba" or "transformers"; any other that has a logit lens gives no attention.
        answer: the answer, as text or token ids; default: what the engine generates.
        max_tokens: of the answer.

    Raises:
        ModelError: the engine does not expose its head.
        ValueError: the answer has no tokens, or ids outside the vocabulary.
        EmbeddingRangeError, PromptError, TraceError: as in `Engine.trace` and `attention_of`.
    """
    if answer is None:
        tokens = engine.generate(prompt, GenerationConfig(max_new_tokens=max_tokens)).token_ids
    else:
        tokens = answer_tokens(engine, answer)[:max_tokens]
    if not tokens:
        raise ValueError("the answer has no tokens: pass answer= with at least one")
    vocab = engine.model.text_config.vocab_size
    if not all(0 <= token < vocab for token in tokens):
        raise ValueError(f"the answer's tokens are {tokens}: ids are 0 to {vocab - 1}")
    whole = continued(prompt, tokens[:-1])
    positions = list(range(len(prompt) - 1, len(whole)))
    trace = engine.trace(
        whole, _LENS, positions, progress=None if progress is None else lambda share: progress(share / 2)
    )
    taps = tuple(trace)
    wanted = torch.tensor(tokens)[:, None]
    words, likeliest, chances, said = [], [], [], []
    for tap in taps:
        chance = engine.logit_lens(trace[tap], normed=tap == "norm").double().cpu().softmax(dim=-1)
        best = chance.max(dim=-1)
        words.append(_texts(engine, best.indices.tolist()))
        likeliest.append(best.indices.numpy())
        chances.append(best.values.numpy())
        said.append(chance.gather(1, wanted)[:, 0].numpy())
    groups = key_groups(whole)[0]
    reads = attention = None
    try:
        found = attention_of(engine, whole, range(engine.model.text_config.num_hidden_layers), positions)
        reads = found.by_group().mean(axis=2)
        attention = np.stack([rows.weights.mean(dim=1).float().numpy() for rows in found.layers.values()])
    except ModelError:  # the lens alone says something, too
        pass
    if progress:
        progress(1.0)
    return AnswerLens(
        tuple(tokens),
        tuple(_texts(engine, tokens)),
        taps,
        words,
        np.stack(likeliest),
        np.stack(chances),
        np.stack(said),
        groups,
        reads,
        attention,
    )


def _texts(engine: Engine, tokens: Sequence[int]) -> list[str]:
    return [answer_text(engine, [token]) for token in tokens]
