"""Lay prompts with spans out in batches: packed end to end in chunks of a token budget, no padding, no span cut in two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import PromptError
from .prompt import Prompt


@dataclass(frozen=True)
class Piece:
    """Tokens `[start, stop)` of prompt number `prompt`."""

    prompt: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class BatchPlan:
    """Which tokens run together.

    Attributes:
        chunks: in the order they run; a prompt's pieces stand in their order, at most one in a chunk.
        lengths: of the prompts, in tokens.
        max_tokens: budget of a chunk.
    """

    chunks: tuple[tuple[Piece, ...], ...]
    lengths: tuple[int, ...]
    max_tokens: int

    @property
    def fill(self) -> list[float]:
        """How full each chunk is, 0 to 1."""
        return [sum(map(len, chunk)) / self.max_tokens for chunk in self.chunks]

    @property
    def padded_tokens(self) -> int:
        """Tokens that one padded batch of the same prompts runs: each as long as the longest."""
        return len(self.lengths) * max(self.lengths)

    @property
    def padding(self) -> int:
        """Of these, tokens that stand for nothing."""
        return self.padded_tokens - sum(self.lengths)

    def __str__(self) -> str:
        lines = [
            f"chunk {number}: {sum(map(len, chunk)):5d} of {self.max_tokens} tokens ({full:4.0%}), "
            + ", ".join(_name(piece, self.lengths[piece.prompt]) for piece in chunk)
            for number, (chunk, full) in enumerate(zip(self.chunks, self.fill, strict=True))
        ]
        share = self.padding / self.padded_tokens
        return "\n".join(
            [
                *lines,
                f"{sum(self.lengths)} tokens in {len(self.chunks)} chunks, no padding; one padded batch would run "
                f"{self.padded_tokens}, {share:.0%} of them padding",
            ]
        )


def plan_batch(prompts: Sequence[Prompt], max_tokens: int, *, split: bool = True) -> BatchPlan:
    """Pack prompts into as few chunks as a first-fit rule finds, longest first.

    Args:
        max_tokens: budget of a chunk, which engines set by what a step may take in time and memory.
        split: whether a prompt may go on in a later chunk (chunked prefill). Bidirectional stretches are never cut: their
            tokens see each other, so they must run together.

    Raises:
        PromptError: a prompt, or a stretch that cannot be cut, is longer than a chunk.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: a chunk needs room for at least one token")
    if not prompts:
        raise PromptError("there are no prompts to plan for")
    for number, prompt in enumerate(prompts):
        prompt.check()
        whole = _stretches(prompt) if split else [(0, len(prompt))]
        for start, stop in whole:
            if stop - start > max_tokens:
                what = f"the bidirectional stretch [{start}, {stop})" if split else "it"
                raise PromptError(
                    f"prompt {number}: {what} has {stop - start} tokens, which run together and exceed a chunk of {max_tokens}: "
                    f"raise max_tokens to {stop - start} or more"
                )
    cuts = [_cuts(prompt) for prompt in prompts]
    done = [0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    chunks = []
    while any(done[number] < len(prompts[number]) for number in order):
        chunk: list[Piece] = []
        room = max_tokens
        # Whole remainders first, so that few prompts are split; then one piece fills what is left.
        for number in order:
            left = len(prompts[number]) - done[number]
            if 0 < left <= room:
                chunk.append(Piece(number, done[number], len(prompts[number])))
                room -= left
        taken = {piece.prompt for piece in chunk}
        if split and room:
            for number in order:
                if number in taken or done[number] == len(prompts[number]):
                    continue
                stop = max((cut for cut in cuts[number] if cut - done[number] <= room), default=0)
                if stop > done[number]:
                    chunk.append(Piece(number, done[number], stop))
                    room -= stop - done[number]
        for piece in chunk:
            done[piece.prompt] = piece.stop
        chunks.append(tuple(chunk))
    return BatchPlan(tuple(chunks), tuple(map(len, prompts)), max_tokens)


def _stretches(prompt: Prompt) -> list[tuple[int, int]]:
    """Bidirectional stretches, those that overlap joined: what runs together with either runs with both."""
    joined: list[tuple[int, int]] = []
    for start, stop in prompt.bidirectional:
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _cuts(prompt: Prompt) -> list[int]:
    """Positions where a prompt may be cut: not inside a bidirectional stretch."""
    inside = {position for start, stop in prompt.bidirectional for position in range(start + 1, stop)}
    return [position for position in range(1, len(prompt) + 1) if position not in inside]


def _name(piece: Piece, length: int) -> str:
    whole = piece.start == 0 and piece.stop == length
    return f"prompt {piece.prompt}" + ("" if whole else f" [{piece.start}, {piece.stop})")
