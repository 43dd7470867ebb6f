"""Prompt: ids, embeddings and ranges. The one record that travels through everything."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from .errors import EmbeddingRangeError, PromptError
from .findings import Finding
from .ranges import Range, range_faults


@dataclass(frozen=True)
class Span:
    """What a range holds, beside its position.

    Attributes:
        grid: of patches, (rows, columns); on models with M-RoPE (time, height, width).
        attention: "bidirectional" where the tokens of the range see each other both ways.
        block: the tokens that see each other where they are more than the range (PaliGemma: the whole prompt), `[start, stop)`.
    """

    modality: str = "image"
    grid: tuple[int, ...] | None = None
    attention: Literal["causal", "bidirectional"] = "causal"
    label: str = ""
    block: Range | None = None

    def __post_init__(self) -> None:
        if self.attention not in ("causal", "bidirectional"):
            raise EmbeddingRangeError(f"attention={self.attention!r}: a span is 'causal' or 'bidirectional'")


@dataclass(frozen=True, eq=False)  # two prompts are the same if their digests are
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
        deepstack: one an item, `[levels, rows_i, hidden]`: level k is added to the item's positions after layer k (Qwen3-VL;
            Meng et al. 2024, arXiv:2406.04334); empty on models without it.
    """

    input_ids: Sequence[int]
    input_embeddings: Sequence[torch.Tensor] = ()
    embedding_ranges: Sequence[Range] = ()
    spans: Sequence[Span] = ()
    position_ids: torch.Tensor | None = None
    deepstack: Sequence[torch.Tensor] = ()

    def __post_init__(self) -> None:
        ids = _plain(self.input_ids)
        ids = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else None
        if ids is None or any(isinstance(token, list) for token in ids):
            raise PromptError(f"input_ids must be one list of token ids; got {self.input_ids!r}")
        plain = all(type(token) is int for token in ids)
        object.__setattr__(self, "input_ids", tuple(ids if plain else map(_integer, ids)))
        object.__setattr__(
            self, "input_embeddings", () if self.input_embeddings is None else tuple(self.input_embeddings)
        )
        try:
            pairs = () if self.embedding_ranges is None else _plain(self.embedding_ranges)
            ranges = tuple((_strict(start), _strict(stop)) for start, stop in pairs)
        except (TypeError, ValueError) as error:
            raise EmbeddingRangeError(
                f"embedding_ranges must be pairs (start, stop) of integers; got {self.embedding_ranges!r}"
            ) from error
        object.__setattr__(self, "embedding_ranges", ranges)
        object.__setattr__(self, "spans", () if self.spans is None else tuple(self.spans))
        object.__setattr__(self, "deepstack", () if self.deepstack is None else tuple(self.deepstack))
        for number, span in enumerate(self.spans):
            if not isinstance(span, Span):
                raise EmbeddingRangeError(f"spans[{number}] is {span!r}: give a workbench.Span")
        if self.position_ids is not None and not isinstance(self.position_ids, torch.Tensor):
            object.__setattr__(self, "position_ids", torch.as_tensor(self.position_ids))

    def __len__(self) -> int:
        return len(self.input_ids)

    def save(self, path: str | Path) -> None:
        """Write a JSON file that can be read and edited, with the rows in a safetensors file beside it."""
        from .prompt_files import save_prompt

        save_prompt(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Prompt:
        """Read what `save` wrote.

        Raises:
            PromptError: a file that is none, damaged, or holds what a prompt does not.
        """
        from .prompt_files import load_prompt

        return load_prompt(path)

    def replace(self, **changes) -> Prompt:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def lookup_ids(self) -> list[int]:
        """The ids to look up: 0 inside ranges, where placeholders of any value may stand."""
        ids = list(self.input_ids)
        for start, stop in self.embedding_ranges:
            ids[start:stop] = [0] * (stop - start)
        return ids

    @property
    def bidirectional(self) -> list[Range]:
        """The stretches of tokens that see each other both ways: ranges, or the blocks that their spans name."""
        pairs = zip(self.embedding_ranges, self.spans, strict=False)
        return sorted({span.block or place for place, span in pairs if span.attention == "bidirectional"})

    @property
    def bare(self) -> Prompt:
        """The ids without anything injected: the run that an injection is compared with."""
        return Prompt(self.input_ids, position_ids=self.position_ids)

    def faults(self, vocab_size: int | None = None, hidden_size: int | None = None) -> Iterator[Finding]:
        """Yield all that makes the prompt impossible to run; sizes left None are not checked."""
        if not self.input_ids:
            yield Finding("prompt-empty", "error", "the prompt has no tokens: give at least one id in input_ids")
            return
        yield from self._id_faults(vocab_size)
        rows = []
        for item, rows_of in enumerate(self.input_embeddings):
            name = f"input_embeddings[{item}]"
            if not is_item(rows_of):
                got = type(rows_of).__name__
                if isinstance(rows_of, torch.Tensor):
                    got = f"{rows_of.dtype} {tuple(rows_of.shape)}, {rows_of.layout}, on {rows_of.device}"
                yield Finding(
                    "item-shape",
                    "error",
                    f"{name} is {got}: give a dense torch tensor [rows, hidden] of float16, bfloat16, float32 or float64",
                    item,
                )
                rows.append(_length(rows_of))
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
        for item, span in enumerate(self.spans):
            if span.block is not None and not 0 <= span.block[0] < span.block[1] <= len(self):
                yield Finding(
                    "span-block",
                    "error",
                    f"spans[{item}].block = {span.block} leaves the prompt of {len(self)} tokens: keep 0 <= start < stop <= {len(self)}",
                    item,
                )
        yield from self._deepstack_faults()
        if self.position_ids is not None and self.position_ids.dtype not in (torch.int32, torch.int64):
            yield Finding(
                "position-dtype",
                "error",
                f"position_ids is {self.position_ids.dtype}: positions are integers, int64 or int32",
            )
        if self.position_ids is not None and tuple(self.position_ids.shape) not in ((len(self),), (3, len(self))):
            yield Finding(
                "position-shape",
                "error",
                f"position_ids is {tuple(self.position_ids.shape)} for {len(self)} tokens: give [{len(self)}], or "
                f"[3, {len(self)}] for M-RoPE",
            )

    def _id_faults(self, vocab_size: int | None) -> Iterator[Finding]:
        if vocab_size is None:
            bad = [position for position, token in enumerate(self.input_ids) if type(token) is not int]
        else:
            bad = [
                position
                for position, token in enumerate(self.input_ids)
                if type(token) is not int or not 0 <= token < vocab_size
            ]
        for position in bad:
            token = self.input_ids[position]
            # An id inside a range is never looked up: engines put placeholders of any value there.
            if type(token) is int and any(start <= position < stop for start, stop in self.embedding_ranges):
                continue
            size = f"a vocabulary of {vocab_size}" if vocab_size is not None else "any vocabulary"
            yield Finding(
                "id-vocabulary",
                "error",
                f"input_ids[{position}] is {token!r}, which is not an id of {size}: tokenize with this model's tokenizer",
            )

    def _deepstack_faults(self) -> Iterator[Finding]:
        if self.deepstack and len(self.deepstack) != len(self.input_embeddings):
            yield Finding(
                "item-deepstack",
                "error",
                f"{len(self.deepstack)} deepstack tensors but {len(self.input_embeddings)} input_embeddings: give one an item, or none",
            )
            return
        for item, (levels, rows) in enumerate(zip(self.deepstack, self.input_embeddings, strict=False)):
            fits = (
                isinstance(levels, torch.Tensor)
                and levels.ndim == 3
                and is_item(rows)
                and levels.shape[1:] == rows.shape
            )
            if not fits or not torch.isfinite(levels).all():
                got = tuple(levels.shape) if isinstance(levels, torch.Tensor) else type(levels).__name__
                yield Finding(
                    "item-deepstack",
                    "error",
                    f"deepstack[{item}] is {got}: give finite numbers [levels, rows, hidden] for the item's {tuple(rows.shape)}",
                    item,
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

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything an engine computes from: ids, rows with their dtype, ranges, attention, positions."""
        sha = hashlib.sha256()
        sha.update(repr((self.input_ids, self.embedding_ranges, self.bidirectional)).encode())
        positions = () if self.position_ids is None else (self.position_ids,)
        for tensor in (*self.input_embeddings, *self.deepstack, *positions):
            sha.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()


@dataclass(frozen=True, eq=False)
class MultimodalPrompt(Prompt):
    """A prompt for an engine with the vision model inside: ids with placeholders, and processed pictures instead of rows.

    Attributes:
        multimodal: what the model's processor made of the pictures, one dict a group of pictures (`pixel_values` and what goes
            with them); groups are joined along their first axis.
    """

    multimodal: Sequence[dict[str, Any]] = ()

    @classmethod
    def of(cls, prompt: Prompt, multimodal: Sequence[dict[str, Any]]) -> MultimodalPrompt:
        """A prompt with pictures added."""
        fields = {field.name: getattr(prompt, field.name) for field in dataclasses.fields(Prompt)}
        return cls(**fields, multimodal=tuple(multimodal))

    @property
    def lookup_ids(self) -> list[int]:
        return list(self.input_ids)

    @cached_property
    def digest(self) -> str:
        sha = hashlib.sha256(super().digest.encode())
        for group in self.multimodal:
            for name in sorted(group):
                value = group[name]
                plain = value.detach().cpu().contiguous() if isinstance(value, torch.Tensor) else repr(value)
                sha.update(name.encode())
                sha.update(
                    plain.encode() if isinstance(plain, str) else plain.flatten().view(torch.uint8).numpy().tobytes()
                )
        return sha.hexdigest()


def is_item(value: Any) -> bool:
    """Whether a value can be an item of `input_embeddings`: dense numbers `[rows, hidden]` that can be read."""
    return (
        isinstance(value, torch.Tensor)
        and value.ndim == 2
        and value.layout is torch.strided
        and value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and value.device.type != "meta"
    )


def _plain(values: Any) -> Any:
    """Tensors and arrays as nested lists, anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def _strict(value: Any) -> int:
    """An integer, refusing what only looks like one: True, 1.5, "1"."""
    if isinstance(value, bool):
        raise TypeError("a bool is no position")
    return operator.index(value)


def _integer(value: Any) -> Any:
    """An integer if it is one; what is none stays, for `faults` to name."""
    try:
        return _strict(value)
    except TypeError:
        return value


def _length(value: Any) -> int:
    try:
        return len(value)
    except TypeError:  # no length at all, or a tensor without dimensions
        return 0
