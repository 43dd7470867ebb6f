"""What an answer takes from each embedding row: a part is replaced, and the odds of the answer are measured again.

This is occlusion (Zeiler and Fergus 2014, arXiv:1311.2901): an intervention, so unlike attention weights it says what the answer would
have lost. Any engine that returns logits can be asked. Odds, p / (1 - p), because the probability of a certain answer hardly changes
before nearly everything that it rests on is gone. Rows of a vision tower contain something of the whole image: to see which part of the
image matters, cover that part and run the tower again (`images=`, `tower=`); to see which rows matter, replace rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from ..engines.base import Engine
from ..engines.cancellation import Cancellable
from ..engines.types import GenerationConfig
from ..errors import ModelError, PromptError
from ..progress import Progress
from ..prompt import MultimodalPrompt, Prompt
from ..schema import shortened
from ..vision.images import ImageLike
from ..vision.tower import VisionTower, load_vision_tower
from .answers import answer_text, answer_tokens, continued
from .replacements import CoveredImages, Part, ReplacedRows, Replacement

_COARSE = 12  # blocks per item before any is divided
_AT_ONCE = 8  # requests given to the engine at the same time
_SHARE = 0.05  # a block that changes less than this share of the largest change is not divided


@dataclass(frozen=True)
class Block:
    """Rows of one item that were replaced together.

    Attributes:
        item: number of the item.
        rows: the rows of the item.
        change: log odds of the target without the replacement minus those with it, in nats: what the target takes from the rows.
    """

    item: int
    rows: tuple[int, ...]
    change: float


@dataclass(frozen=True)
class Attribution:
    """What a target takes from the rows of a prompt's items.

    Attributes:
        prompt: the prompt.
        target: the target's token ids, and `text` their text.
        odds: the log of its odds p / (1 - p) given the prompt as it is, in nats, summed over its tokens.
        logprob: the log of its probability, in nats.
        items: for each item, the change when all of it is replaced.
        blocks: the smaller blocks that were measured, each only once, from coarse to fine.
        noise: standard deviation of the change of one block over other baselines: changes below twice that say nothing.
        baseline: what rows were replaced by.
        runs: how many variants of the prompt were run.
        complete: False if the run was cancelled, or stopped at `max_runs`, before all blocks that matter were divided into rows.
    """

    prompt: Prompt
    target: tuple[int, ...]
    text: str
    odds: float
    logprob: float
    items: tuple[float, ...]
    blocks: tuple[Block, ...]
    noise: float
    baseline: str
    runs: int
    complete: bool
    _rows: tuple[np.ndarray, ...] = field(repr=False)

    def rows(self, item: int) -> np.ndarray:
        """The change per row of an item, float64 `[rows]`: that of the smallest block that contains the row, divided by its size.

        NaN for rows of which no block was measured (a cancelled run).
        """
        return self._rows[item]

    def significant(self, item: int) -> np.ndarray:
        """Whether the smallest block that contains a row changes more than twice `noise`, bool `[rows]`."""
        found = np.zeros(len(self._rows[item]), bool)
        for block in self.blocks:  # finer blocks come later
            if block.item == item:
                found[list(block.rows)] = abs(block.change) > 2 * self.noise
        return found

    def share(self, item: int, rows: Iterable[int]) -> float:
        """The share of these rows of an item in the sum of all significant positive changes, over all items; NaN if there is none."""
        positive = [np.where(self.significant(n), self._rows[n], 0.0).clip(min=0.0) for n in range(len(self._rows))]
        total = sum(float(np.nansum(each)) for each in positive)
        return float(np.nansum(positive[item][sorted(set(rows))])) / total if total else float("nan")

    def __str__(self) -> str:
        state = "" if self.complete else ", stopped early"
        lines = [
            f"{self.text!r}: log odds {self.odds:.2f}; replaced by {self.baseline}; {self.runs} runs{state}",
            "the noise was not measured: raise max_runs"
            if np.isnan(self.noise)
            else f"noise {self.noise:.3f} nats: changes below {2 * self.noise:.3f} say nothing",
        ]
        for number, change in enumerate(self.items):
            best = np.argsort(-np.nan_to_num(self._rows[number], nan=-np.inf))[:5]
            rows = ", ".join(f"{row} ({self._rows[number][row]:.2f})" for row in best if self.significant(number)[row])
            lines.append(
                f"item {number}: without all of it {change:+.2f}; most from rows {rows or 'none that is significant'}"
            )
        return "\n".join(lines)


def attribute(
    engine: Engine,
    prompt: Prompt,
    target: str | Sequence[int] | slice | None = None,
    *,
    answer: str | Sequence[int] | None = None,
    baseline: str | torch.Tensor | Sequence[torch.Tensor] = "mean",
    images: Sequence[ImageLike] = (),
    tower: VisionTower | None = None,
    max_runs: int = 256,
    repeats: int = 8,
    progress: Progress | None = None,
    cancelled: Cancellable | None = None,
) -> Attribution:
    """Measure what an answer takes from each embedding row of a prompt, or from each part of its images.

    Whole items are replaced first, then blocks of rows; blocks that matter are divided further, down to single rows. The answer is
    teacher-forced: every variant is asked for the same tokens.

    Args:
        engine: any engine that returns logits.
        prompt: with at least one item.
        target: the part of the answer to measure, as text, token ids or a slice of its tokens; default: all of it.
        answer: the answer, as text or token ids; default: what the engine generates, at most 12 tokens.
        baseline: what rows are replaced by: "mean", the mean row of the item; "placeholder", the placeholder token's embedding; a row
            `[hidden]`; or one tensor `[rows_i, hidden]` per item. With images: "mean", their mean colour, or "blur".
        images: the images that the prompt was built from, one per item: their parts are covered instead of rows being replaced.
        tower: computes the features of covered images; loaded if it is needed.
        max_runs: limit of the variants of the prompt.
        repeats: how many other baselines (rows of the same item, chosen at random) are tried on a block that hardly matters, for the noise.
        progress: called with the fraction of the work that is known so far.
        cancelled: if it is set, the run ends and returns what it has.

    Raises:
        PromptError: a prompt without items, or one with images for a vision model inside the engine; a baseline that does not fit or
            is not finite; as in `Engine.check`.
        ModelError: the engine does not return logits, or they are not finite.
        ValueError: a target that is not part of the answer, or an answer without tokens.
    """
    if isinstance(prompt, MultimodalPrompt) or not prompt.input_embeddings:
        raise PromptError(
            "this prompt has no input_embeddings whose rows could be replaced: build it with build_prompt"
        )
    if max_runs < 1 or repeats < 2:
        raise ValueError(f"max_runs={max_runs}, repeats={repeats}: at least one run and two repeats are needed")
    engine.check(prompt, 1)
    replacement: Replacement
    if images:
        if not isinstance(baseline, str):
            raise PromptError(
                "images are covered with their 'mean' or 'blur': leave images out to replace rows by given ones"
            )
        replacement = CoveredImages(prompt, images, tower or load_vision_tower(engine.model), baseline)
    else:
        replacement = ReplacedRows(engine, prompt, baseline)
    tokens = answer_tokens(engine, answer) if answer is not None else _generated(engine, prompt)
    if not tokens:
        raise ValueError("the answer has no tokens: pass answer= with at least one")
    first, last = _find(engine, tokens, target)
    work = _Work(engine, prompt, replacement, tokens, first, last, max_runs, progress, cancelled)
    work.run(repeats)
    return work.result()


def _generated(engine: Engine, prompt: Prompt) -> list[int]:
    return engine.generate(prompt, GenerationConfig(max_new_tokens=12)).token_ids


def _find(engine: Engine, tokens: Sequence[int], target: str | Sequence[int] | slice | None) -> tuple[int, int]:
    """The half-open range of the answer's tokens that the target is: the shortest that contains its text."""
    if target is None:
        return 0, len(tokens)
    if isinstance(target, slice):
        start, stop, step = target.indices(len(tokens))
        if step == 1 and start < stop:
            return start, stop
    elif isinstance(target, str):
        for size in range(1, len(tokens) + 1):
            for start in range(len(tokens) - size + 1):
                if target and target in answer_text(engine, tokens[start : start + size]):
                    return start, start + size
    else:
        wanted = [int(token) for token in target]
        for start in range(len(tokens) - len(wanted) + 1):
            if wanted and list(tokens[start : start + len(wanted)]) == wanted:
                return start, start + len(wanted)
    raise ValueError(
        f"target={shortened(target)} is not in the answer {answer_text(engine, tokens)!r} (tokens {list(tokens)}): choose a part of it, or pass "
        "answer= to measure another answer"
    )


class _Work:
    """One run of `attribute`."""

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        replacement: Replacement,
        tokens: Sequence[int],
        first: int,
        last: int,
        max_runs: int,
        progress: Progress | None,
        cancelled: Cancellable | None,
    ) -> None:
        self.engine, self.prompt, self.replacement = engine, prompt, replacement
        self.tokens, self.first, self.last = list(tokens), first, last
        self.max_runs, self.progress, self.cancelled = max_runs, progress, cancelled
        self.blocks: list[Block] = []
        self.items: list[float] = []
        self.runs, self.planned = 0, 1
        self.noise, self.odds, self.logprob = float("nan"), float("nan"), float("nan")
        self.complete = False

    def run(self, repeats: int) -> None:
        """Measure from coarse to fine, until nothing that matters is left to divide."""
        items = self.prompt.input_embeddings
        whole = [(number, tuple(range(len(item)))) for number, item in enumerate(items)]
        coarse = [block for number, rows in whole for block in self._divided(number, rows, _COARSE)]
        self.planned = 1 + len(whole) + len(coarse) + repeats
        unchanged = self._measure([self.prompt])
        if not unchanged:
            return
        self.odds, self.logprob = unchanged[0]
        self.items = [block.change for block in self._changes(whole)]
        found = self._changes(coarse)
        self.blocks += found
        if len(self.items) < len(whole) or len(found) < len(coarse):
            return
        self._measure_noise(repeats)
        if np.isnan(self.noise):
            return
        while True:
            least = max(2 * self.noise, _SHARE * max(abs(block.change) for block in self.blocks))
            divide = [block for block in found if len(block.rows) > 1 and abs(block.change) > least]
            if not divide:
                self.complete = True
                return
            smaller = [each for block in divide for each in self._divided(block.item, block.rows, 4)]
            self.planned = self.runs + len(smaller)
            found = self._changes(smaller)
            self.blocks += found
            if len(found) < len(smaller):
                return

    def result(self) -> Attribution:
        """What was measured so far."""
        rows = [np.full(len(item), np.nan) for item in self.prompt.input_embeddings]
        for block in self.blocks:
            rows[block.item][list(block.rows)] = block.change / len(block.rows)
        items = (*self.items, *[float("nan")] * (len(rows) - len(self.items)))
        target = tuple(self.tokens[self.first : self.last])
        text = answer_text(self.engine, target)
        return Attribution(
            self.prompt, target, text, self.odds, self.logprob, items, tuple(self.blocks), self.noise, self.replacement.name, self.runs,
            self.complete, tuple(rows),
        )  # fmt: skip

    def _divided(self, item: int, rows: tuple[int, ...], parts: int) -> list[Part]:
        """About `parts` blocks of these rows: halves of the longer side of their grid, again and again."""
        grid = self.prompt.spans[item].grid if self.prompt.spans else None
        count = len(self.prompt.input_embeddings[item])
        columns = grid[-1] if grid and int(np.prod(grid)) == count else count
        blocks = [rows]
        while len(blocks) < parts and max(map(len, blocks)) > 1:
            largest = max(blocks, key=len)
            blocks.remove(largest)
            places = np.array([divmod(row, columns) for row in largest])
            extent = places.max(axis=0) - places.min(axis=0)
            axis = int(extent[1] >= extent[0])
            middle = places[:, axis].min() + (extent[axis] + 1) / 2
            below = tuple(row for row, place in zip(largest, places[:, axis], strict=True) if place < middle)
            above = tuple(row for row, place in zip(largest, places[:, axis], strict=True) if place >= middle)
            blocks += [below, above]
        return [(item, each) for each in blocks]

    def _changes(self, parts: Sequence[Part]) -> list[Block]:
        """Measure parts; those that were not, because the run was cancelled or reached its limit, are missing at the end."""
        measured: list[tuple[float, float]] = []
        for start in range(0, len(parts), _AT_ONCE):
            group = parts[start : start + _AT_ONCE]
            if self._stopped():
                break
            measured += self._measure(self.replacement.variants(group))
        return [Block(item, rows, self.odds - odds) for (item, rows), (odds, _) in zip(parts, measured, strict=False)]

    def _measure_noise(self, repeats: int) -> None:
        """The spread of a block's change over other replacements, for the block with the median change."""
        block = sorted(self.blocks, key=lambda block: abs(block.change))[len(self.blocks) // 2]
        generator = torch.Generator().manual_seed(0)
        measured = self._measure(self.replacement.others((block.item, block.rows), repeats, generator))
        if len(measured) == repeats:
            self.noise = float(np.std([odds for odds, _ in measured], ddof=1))

    def _stopped(self) -> bool:
        return self.runs > self.max_runs or (self.cancelled is not None and self.cancelled.is_set())

    def _measure(self, variants: Sequence[Prompt]) -> list[tuple[float, float]]:
        """The target's log odds and log probability given each of the variants, as far as the limit and a cancellation allow."""
        allowed = list(variants[: max(self.max_runs + 1 - self.runs, 0)])
        results: list[tuple[float, float]] = []
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for start in range(0, len(allowed), _AT_ONCE):
                if self._stopped():
                    break
                group = allowed[start : start + _AT_ONCE]
                results += pool.map(self._chances, group)
                self.runs += len(group)
                if self.progress:
                    self.progress(min(self.runs / max(self.planned, 1), 1.0))
        return results

    def _chances(self, prompt: Prompt) -> tuple[float, float]:
        odds = logprob = 0.0
        config = GenerationConfig(max_new_tokens=1, ignore_eos=True, output_logits="generation")
        for place in range(self.first, self.last):
            output = self.engine.generate(continued(prompt, self.tokens[:place]), config)
            if output.logits is None:
                raise ModelError(
                    f"{self.engine.capabilities.name} does not return logits, which attribute needs: use another engine"
                )
            logits, token = output.logits[-1].double(), self.tokens[place]
            others = torch.cat([logits[:token], logits[token + 1 :]])
            odds += float(logits[token] - others.logsumexp(dim=0))
            logprob += float(logits.log_softmax(dim=0)[token])
        if not np.isfinite(odds):
            raise ModelError(
                f"the log odds of the target are {odds}: the engine's logits are not finite; workbench.check_engine says where"
            )
        return odds, logprob
