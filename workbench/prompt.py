"""Prompt: ids, embeddings and ranges. The one record that travels through everything."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .errors import EmbeddingRangeError, PromptError
from .findings import Finding
from .ranges import Range, range_faults


@dataclass(frozen=True)
class Span:
    """What a range holds, beside its position: modality, patch grid (rows, columns), and how its tokens attend."""

    modality: str = "image"
    grid: tuple[int, ...] | None = None
    attention: Literal["causal", "bidirectional"] = "causal"
    label: str = ""


@dataclass(frozen=True)
class Prompt:
    """Token ids, and rows that replace the token embeddings inside ranges.

    A Prompt may be wrong: the workbench exists to show wrong prompts. `check` raises on the first fault, `faults` (and
    `workbench.lint`) return all of them.

    Attributes:
        input_ids: token ids, length `seq`.
        input_embeddings: items, each `[rows_i, hidden]`.
        embedding_ranges: half-open `(start, stop)`; item i replaces the token embeddings there.
        spans: what each range holds; empty, or one a range.
        position_ids: `[seq]`, or `[3, seq]` for M-RoPE; None means 0, 1, 2, ...
    """

    input_ids: Sequence[int]
    input_embeddings: Sequence[torch.Tensor] = ()
    embedding_ranges: Sequence[Range] = ()
    spans: Sequence[Span] = ()
    position_ids: torch.Tensor | None = None

    def __post_init__(self) -> None:
        ids = self.input_ids.tolist() if isinstance(self.input_ids, torch.Tensor) else list(self.input_ids)
        object.__setattr__(self, "input_ids", tuple(ids))
        object.__setattr__(self, "input_embeddings", tuple(self.input_embeddings or ()))
        try:
            ranges = tuple((int(start), int(stop)) for start, stop in self.embedding_ranges or ())
        except (TypeError, ValueError) as error:
            raise EmbeddingRangeError(
                f"embedding_ranges must be pairs (start, stop) of integers; got {self.embedding_ranges!r}"
            ) from error
        object.__setattr__(self, "embedding_ranges", ranges)
        object.__setattr__(self, "spans", tuple(self.spans or ()))

    def __len__(self) -> int:
        return len(self.input_ids)

    def replace(self, **changes) -> Prompt:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def bidirectional(self) -> list[Range]:
        """The ranges whose tokens see their whole span."""
        pairs = zip(self.embedding_ranges, self.spans, strict=False)
        return [place for place, span in pairs if span.attention == "bidirectional"]

    def faults(self, vocab_size: int | None = None, hidden_size: int | None = None) -> Iterator[Finding]:
        """Yield all that makes the prompt impossible to run; sizes left None are not checked."""
        if not self.input_ids:
            yield Finding("prompt-empty", "error", "the prompt has no tokens: give at least one id in input_ids")
            return
        inside = {p for start, stop in self.embedding_ranges for p in range(max(start, 0), min(stop, len(self)))}
        for position, token in enumerate(self.input_ids):
            whole = isinstance(token, int) and not isinstance(token, bool)
            # An id inside a range is never looked up: engines put placeholders of any value there.
            if not whole or (vocab_size is not None and position not in inside and not 0 <= token < vocab_size):
                size = f"a vocabulary of {vocab_size}" if vocab_size is not None else "any vocabulary"
                yield Finding(
                    "id-vocabulary",
                    "error",
                    f"input_ids[{position}] is {token!r}, which is not an id of {size}: tokenize with this model's tokenizer",
                )
        rows = []
        for item, rows_of in enumerate(self.input_embeddings):
            name = f"input_embeddings[{item}]"
            if not isinstance(rows_of, torch.Tensor) or rows_of.ndim != 2 or not rows_of.is_floating_point():
                got = (
                    f"{rows_of.dtype} {tuple(rows_of.shape)}"
                    if isinstance(rows_of, torch.Tensor)
                    else type(rows_of).__name__
                )
                yield Finding(
                    "item-shape", "error", f"{name} is {got}: give a floating-point torch tensor [rows, hidden]", item
                )
                rows.append(len(rows_of) if hasattr(rows_of, "__len__") else 0)
                continue
            rows.append(rows_of.shape[0])
            if hidden_size is not None and rows_of.shape[1] != hidden_size:
                yield Finding(
                    "item-width",
                    "error",
                    f"{name} is {rows_of.shape[1]} wide but the model's hidden size is {hidden_size}: project the features "
                    "to the language model's width (a vision model's projector does that)",
                    item,
                )
            finite = torch.isfinite(rows_of).all(dim=1)
            if not finite.all():
                bad = (~finite).nonzero().flatten().tolist()
                yield Finding(
                    "item-finite",
                    "error",
                    f"{name} has NaN or infinity in {len(bad)} of {rows_of.shape[0]} rows, first in row {bad[0]}: look at "
                    "what made it (float16 overflow in a vision tower is a common cause)",
                    item,
                )
        yield from range_faults(self.embedding_ranges, len(self), rows)
        if self.spans and len(self.spans) != len(self.embedding_ranges):
            yield Finding(
                "span-count",
                "error",
                f"{len(self.spans)} spans but {len(self.embedding_ranges)} embedding_ranges: give one span a range, or none",
            )
        if self.position_ids is not None and tuple(self.position_ids.shape) not in ((len(self),), (3, len(self))):
            yield Finding(
                "position-shape",
                "error",
                f"position_ids is {tuple(self.position_ids.shape)} for {len(self)} tokens: give [{len(self)}], or "
                f"[3, {len(self)}] for M-RoPE",
            )

    def check(self, vocab_size: int | None = None, hidden_size: int | None = None) -> None:
        """Raise on the first fault.

        Raises:
            EmbeddingRangeError: items or ranges that do not fit.
            PromptError: any other fault.
        """
        for fault in self.faults(vocab_size, hidden_size):
            about_ranges = fault.code.startswith(("range", "row", "item", "span"))
            raise (EmbeddingRangeError if about_ranges else PromptError)(fault.message)

    @property
    def digest(self) -> str:
        """SHA-256 over everything an engine computes from: ids, rows with their dtype, ranges, attention, positions."""
        sha = hashlib.sha256()
        sha.update(repr((self.input_ids, self.embedding_ranges, [span.attention for span in self.spans])).encode())
        for tensor in (*self.input_embeddings, *(() if self.position_ids is None else (self.position_ids,))):
            sha.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()
