"""Pack prompts with spans into batches: end to end within a token budget, without padding, and without splitting a bidirectional span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import PromptError
from .prompt import Prompt


@dataclass(frozen=True)
class PackedChunk:
    """Tokens `[start, stop)` of `prompts[prompt]`, an index into the sequence given to `plan_batch`."""

    prompt: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class BatchPlan:
    """Which tokens of several prompts run in which forward pass.

    Attributes:
        batches: for each forward pass its chunks, in the order in which they run. A batch has at most one chunk of each prompt.
        lengths: number of tokens of each prompt.
        max_tokens: token budget of a batch.
    """

    batches: tuple[tuple[PackedChunk, ...], ...]
    lengths: tuple[int, ...]
    max_tokens: int

    @property
    def fill(self) -> list[float]:
        """How full each batch is, 0 to 1."""
        return [sum(map(len, batch)) / self.max_tokens for batch in self.batches]

    @property
    def padded_tokens(self) -> int:
        """For comparison: tokens that one padded batch of the same prompts computes, with every prompt padded to the longest."""
        return len(self.lengths) * max(self.lengths)

    @property
    def padding(self) -> int:
        """How many of `padded_tokens` are padding."""
        return self.padded_tokens - sum(self.lengths)

    def __str__(self) -> str:
        lines = [
            f"batch {number}: {sum(map(len, batch)):5d} of {self.max_tokens} tokens ({full:4.0%}), "
            + ", ".join(_name(chunk, self.lengths[chunk.prompt]) for chunk in batch)
            for number, (batch, full) in enumerate(zip(self.batches, self.fill, strict=True))
        ]
        share = self.padding / self.padded_tokens
        return "\n".join(
            [
                *lines,
                f"{sum(self.lengths)} tokens in {len(self.batches)} batches, no padding; one padded batch would compute "
                f"{self.padded_tokens}, {share:.0%} of them padding",
            ]
        )


def plan_batch(prompts: Sequence[Prompt], max_tokens: int, *, split: bool = True) -> BatchPlan:
    """Pack prompts into batches by first fit, longest prompt first.

    Args:
        max_tokens: token budget of a batch.
        split: whether a prompt may continue in a later batch (chunked prefill). Bidirectional ranges are never split: their tokens
            attend to each other, so they must run together.

    Raises:
        PromptError: a prompt is invalid, or one that cannot be split, or its bidirectional range, is longer than a batch.
        ValueError: `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: a batch needs space for at least one token")
    if not prompts:
        raise PromptError("no prompts to pack: give at least one")
    for number, prompt in enumerate(prompts):
        prompt.check()
        unsplittable = _merged(prompt.bidirectional_ranges) if split else [(0, len(prompt))]
        for start, stop in unsplittable:
            if stop - start > max_tokens:
                what = f"the bidirectional range [{start}, {stop})" if split else "it"
                raise PromptError(
                    f"prompt {number}: {what} has {stop - start} tokens, which must run together and exceed a batch of "
                    f"{max_tokens}: raise max_tokens to {stop - start} or more"
                )
    cuts = [_cuts(prompt) for prompt in prompts]
    done = [0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    batches = []
    while any(done[number] < len(prompts[number]) for number in order):
        batch: list[PackedChunk] = []
        free = max_tokens
        # Whole remainders first, so that few prompts are split; then chunks fill the rest of the budget.
        for number in order:
            left = len(prompts[number]) - done[number]
            if 0 < left <= free:
                batch.append(PackedChunk(number, done[number], len(prompts[number])))
                free -= left
        taken = {chunk.prompt for chunk in batch}
        if split and free:
            for number in order:
                if number in taken or done[number] == len(prompts[number]):
                    continue
                stop = max((cut for cut in cuts[number] if cut - done[number] <= free), default=0)
                if stop > done[number]:
                    batch.append(PackedChunk(number, done[number], stop))
                    free -= stop - done[number]
        for chunk in batch:
            done[chunk.prompt] = chunk.stop
        batches.append(tuple(batch))
    return BatchPlan(tuple(batches), tuple(map(len, prompts)), max_tokens)


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge overlapping ranges: their tokens must all run together."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _cuts(prompt: Prompt) -> list[int]:
    """Return the positions at which a chunk of the prompt may end, its length included: not inside a bidirectional range."""
    inside = {position for start, stop in prompt.bidirectional_ranges for position in range(start + 1, stop)}
    return [position for position in range(1, len(prompt) + 1) if position not in inside]


def _name(chunk: PackedChunk, length: int) -> str:
    whole = chunk.start == 0 and chunk.stop == length
    return f"prompt {chunk.prompt}" + ("" if whole else f" [{chunk.start}, {chunk.stop})")
