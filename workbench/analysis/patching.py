"""Activation patching: how much of an answer moves when states of another run are put into this one, layer by layer and span by span.

Two prompts of the same length differ in something, such as an image, and are answered differently. One run gets the states of the other
at one tap and one group of tokens at a time; the logit difference between the two answers says how far the answer moves towards the other
prompt's (Meng et al. 2022, arXiv:2202.05262; on the measure: Zhang and Nanda 2023, arXiv:2309.16042).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch

from ..engines.base import Engine
from ..engines.cancellation import Cancellable
from ..engines.types import GenerationConfig
from ..errors import PromptError, TraceError
from ..progress import Progress
from ..prompt import Prompt
from ..trace import Patch, Trace
from ..trace.positions import choose_positions
from .answers import answer_text, continued
from .attention import key_groups

PARTS = {"layers": "", "attention": ".attention", "mlp": ".mlp"}


@dataclass(frozen=True)
class PatchEffects:
    """What patches of single taps and groups of tokens do to an answer.

    Attributes:
        tokens: the ids whose logits are compared: that of the other prompt's answer, and that of this prompt's.
        words: their texts.
        taps: what was patched, from the first layer up.
        groups: names of the groups of tokens that were patched together, and `positions` their positions.
        own: logit[tokens[0]] - logit[tokens[1]] of the prompt as it is; `other`: that of the other run.
        values: that difference with each patch, float64 `[taps, groups]`; NaN: not run.
        complete: False if the run was cancelled.
    """

    tokens: tuple[int, int]
    words: tuple[str, str]
    taps: tuple[str, ...]
    groups: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    own: float
    other: float
    values: np.ndarray
    complete: bool

    def shares(self) -> np.ndarray:
        """How far each patch moves the answer, float64 `[taps, groups]`: 0 leaves it, 1 makes the difference that of the other run."""
        return (self.values - self.own) / (self.other - self.own)

    def __str__(self) -> str:
        shares = self.shares()
        lines = [
            f"logit of {self.words[0]!r} minus logit of {self.words[1]!r}: {self.own:+.2f}, in the other run {self.other:+.2f}",
            f"{'patched at':20}" + "".join(f"{name[:13]:>14}" for name in self.groups),
        ]
        lines += [
            f"{tap:20}"
            + "".join(f"{round(share, 2) + 0.0:14.0%}" if np.isfinite(share) else f"{'-':>14}" for share in row)
            for tap, row in zip(self.taps, shares, strict=True)
        ]
        return "\n".join(lines if self.complete else [*lines, "cancelled before all patches were run"])


def patch_effects(
    engine: Engine,
    prompt: Prompt,
    source: Prompt | Trace,
    tokens: tuple[int, int] | None = None,
    *,
    part: str = "layers",
    layers: Sequence[int] | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
    progress: Progress | None = None,
    cancelled: Cancellable | None = None,
) -> PatchEffects:
    """Patch every layer and group of tokens of a prompt's run in turn with the states of another run.

    Args:
        engine: one that takes patches: "numba" or "transformers".
        source: another prompt of the same length, which this engine runs; or a trace of all positions, for example another engine's
            of the same prompt, with the taps that are patched and logits.
        tokens: the two ids whose logits are compared; default: the first tokens at which the two answers differ. What both answers say
            before them is given.
        part: what is patched: "layers", the residual stream after each layer, or what "attention" or "mlp" adds to it.
        layers: numbers of the layers; default: all.
        groups: names and positions in the prompt (negative ones count from its end) of the tokens that are patched together; default: the first tokens ("sinks"), each embedding range,
            the other text, and the last token.
        progress: called with the fraction of patches run.
        cancelled: if it is set, the run ends and returns what it has.

    Raises:
        PromptError: a prompt of another length; as in `Engine.check`.
        ValueError: the two answers are the same, or the two logit differences are; an unknown part, layer, token or position.
        TraceError: the trace lacks taps or positions.
        ModelError: the engine does not take patches.
    """
    if part not in PARTS:
        raise ValueError(f"part={part!r}: choose one of {', '.join(PARTS)}")
    length = source.provenance["tokens"] if isinstance(source, Trace) else len(source)
    if length != len(prompt):
        raise PromptError(
            f"the other run has {length} tokens, the prompt {len(prompt)}: states are put at the same positions, so both must have the same"
        )
    count = engine.model.text_config.num_hidden_layers
    chosen = list(range(count)) if layers is None else [int(layer) for layer in layers]
    if not chosen or not all(0 <= layer < count for layer in chosen):
        raise ValueError(f"layers={layers!r}: the model has layers 0 to {count - 1}")
    taps = [f"layers.{layer}{PARTS[part]}" for layer in chosen]
    if isinstance(source, Trace):
        if "logits" not in source or len(source.positions) != length:
            raise TraceError("the trace that states come from needs all positions and logits: trace them")
        first, other, last = prompt, source, source
    else:
        shared = [] if tokens is not None else _shared_answer(engine, prompt, source)
        first = continued(prompt, shared)
        theirs = continued(source, shared)
        other = engine.trace(theirs, taps)
        last = engine.trace(theirs, ["logits"], [len(theirs) - 1])  # logits of every token could take gigabytes
    own = engine.trace(first, ["logits"], [len(first) - 1])["logits"][-1].double()
    wanted = last["logits"][-1].double()
    pair = (int(wanted.argmax()), int(own.argmax())) if tokens is None else (int(tokens[0]), int(tokens[1]))
    if not all(0 <= token < len(own) for token in pair):
        raise ValueError(f"tokens {pair}: ids are 0 to {len(own) - 1}")

    def difference(logits: torch.Tensor) -> float:
        return float(logits[pair[0]] - logits[pair[1]])

    if pair[0] == pair[1] and tokens is None:
        raise ValueError(
            f"both runs are answered by {answer_text(engine, pair[:1])!r}, so nothing can move: choose runs with different answers, or tokens="
        )
    if difference(own) == difference(wanted):
        raise ValueError(
            f"the difference of the logits of tokens {pair} is {difference(own):+.3f} in both runs, so nothing can move: choose other "
            "tokens, or another run"
        )
    named = _groups(first)
    if groups is not None:
        named = {name: choose_positions(list(at), len(prompt)).tolist() for name, at in groups.items()}
    values = np.full((len(taps), len(named)), np.nan)
    places = [(row, column) for row in reversed(range(len(taps))) for column in range(len(named))]
    complete = True
    for number, (row, column) in enumerate(places):
        if cancelled is not None and cancelled.is_set():
            complete = False
            break
        at = list(named.values())[column]
        patch = Patch.of(other, taps[row], at)
        run = engine.trace(first, ["logits"], [len(first) - 1], patches=[patch])
        values[row, column] = difference(run["logits"][-1].double())
        if progress:
            progress((number + 1) / len(places))
    words = (answer_text(engine, pair[:1]), answer_text(engine, pair[1:]))
    return PatchEffects(
        pair, words, tuple(taps), tuple(named), tuple(tuple(at) for at in named.values()), difference(own), difference(wanted),
        values, complete,
    )  # fmt: skip


def _shared_answer(engine: Engine, prompt: Prompt, source: Prompt) -> list[int]:
    """What the greedy answers to both prompts begin with."""
    config = GenerationConfig(max_new_tokens=12)
    answers = [engine.generate(each, config).token_ids for each in (prompt, source)]
    return [mine for mine, _ in takewhile(lambda both: both[0] == both[1], zip(*answers, strict=False))]


def _groups(prompt: Prompt) -> dict[str, list[int]]:
    """The groups of `key_groups`, with the last token apart; those without tokens are left out."""
    names, members = key_groups(prompt)
    last = len(prompt) - 1
    found = {
        name: [position for position in np.flatnonzero(row).tolist() if position != last]
        for name, row in zip(names, members, strict=True)
    }
    return {name: positions for name, positions in {**found, "last token": [last]}.items() if positions}
