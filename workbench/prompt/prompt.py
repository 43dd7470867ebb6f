"""Prompt: ids, embeddings and ranges; the input of every engine, check and view."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from ..errors import EmbeddingRangeError, PromptError
from ..schema import shortened
from .checks import check_prompt, has_storage, prompt_findings
from .files import read_prompt, write_prompt
from .findings import Finding
from .ranges import Range


@dataclass(frozen=True)
class Span:
    """What an embedding range contains: span i describes range i of `Prompt.embedding_ranges`.

    Attributes:
        modality: "image", "audio", ...
        grid: patch grid of the rows, (rows, columns); (time, height, width) on models with M-RoPE; None if they form no grid.
        attention: whether the tokens of the range attend to each other bidirectionally, or only to earlier ones ("causal").
        label: a name for display.
        block: `[start, stop)` of the tokens that attend bidirectionally, if larger than the range (PaliGemma: the whole prompt).

    Raises:
        EmbeddingRangeError: another value of `attention`, or a value of the wrong type.
    """

    modality: str = "image"
    grid: tuple[int, ...] | None = None
    attention: Literal["causal", "bidirectional"] = "causal"
    label: str = ""
    block: Range | None = None

    def __post_init__(self) -> None:
        if self.attention not in ("causal", "bidirectional"):
            raise EmbeddingRangeError(f"attention={shortened(self.attention)}: a span is 'causal' or 'bidirectional'")
        for name in ("modality", "label"):
            if not isinstance(getattr(self, name), str):
                raise EmbeddingRangeError(f"{name}={shortened(getattr(self, name))}: it must be a string")
        for name, wanted in (("grid", "integers"), ("block", "a pair (start, stop) of integers")):
            value = getattr(self, name)
            if value is None:
                continue
            try:
                numbers = tuple(map(_strict, _plain(value)))
            except (TypeError, ValueError) as error:
                raise EmbeddingRangeError(f"{name}={shortened(value)}: it must be {wanted}") from error
            if name == "block" and len(numbers) != 2:
                raise EmbeddingRangeError(f"{name}={shortened(value)}: it must be {wanted}")
            object.__setattr__(self, name, numbers)


@dataclass(frozen=True, eq=False)  # to compare two prompts, compare their digests
class Prompt:
    """Token ids, and embedding vectors (rows) that replace the token embeddings inside ranges.

    A Prompt may be invalid, so that it can be examined; only types are checked when it is created. `check` raises the first
    problem, `findings` (and `workbench.lint`) return all of them.

    Attributes:
        input_ids: token ids, length `seq`; inside ranges they are placeholders of any value.
        input_embeddings: items, each a tensor `[rows_i, hidden]`, for example the features of one image.
        embedding_ranges: half-open `(start, stop)`, one per item; item i replaces the token embeddings there.
        spans: what each range contains; empty, or one per range.
        position_ids: rotary positions, integers `[seq]`, or `[3, seq]` for M-RoPE (`[4, seq]` in HunYuan-VL); None means 0, 1, 2, ...
        deepstack: one per item, `[levels, rows_i, hidden]`: level k is added to the hidden states of the item's tokens after layer
            k (Qwen3-VL; Meng et al. 2024, arXiv:2406.04334); empty on models without it.

    Raises:
        PromptError: `input_ids` is not one list, or `position_ids` are not numbers.
        EmbeddingRangeError: `embedding_ranges` are not pairs of integers, another field is not a list, or `spans` contains something
            else than spans.
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
            raise PromptError(f"input_ids must be one list of token ids; got {shortened(self.input_ids)}")
        plain = all(type(token) is int for token in ids)
        object.__setattr__(self, "input_ids", tuple(ids if plain else map(_integer, ids)))
        try:
            pairs = () if self.embedding_ranges is None else _plain(self.embedding_ranges)
            ranges = tuple((_strict(start), _strict(stop)) for start, stop in pairs)
        except (TypeError, ValueError) as error:
            raise EmbeddingRangeError(
                f"embedding_ranges must be pairs (start, stop) of integers; got {shortened(self.embedding_ranges)}"
            ) from error
        object.__setattr__(self, "embedding_ranges", ranges)
        for name in ("input_embeddings", "spans", "deepstack"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        for number, span in enumerate(self.spans):
            if not isinstance(span, Span):
                raise EmbeddingRangeError(f"spans[{number}] is {shortened(span)}: give a workbench.Span")
        if self.position_ids is not None and not isinstance(self.position_ids, torch.Tensor):
            try:
                object.__setattr__(self, "position_ids", torch.as_tensor(self.position_ids))
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise PromptError(
                    f"position_ids={shortened(self.position_ids)}: give integers [seq], or [3, seq] for M-RoPE"
                ) from error

    def __len__(self) -> int:
        return len(self.input_ids)

    def save(self, path: str | Path) -> None:
        """Write a JSON file that can be read and edited, and next to it `<name>.<checksum>.safetensors` with the rows.

        Raises:
            PromptError: the prompt contains processed images, which cannot be saved; or the files cannot be written.
        """
        if type(self) is not Prompt:
            raise PromptError(
                f"a {type(self).__name__} cannot be saved: processed images belong to one model's processor. Save a Prompt"
            )
        fields = {
            "input_ids": list(self.input_ids),
            "embedding_ranges": [list(pair) for pair in self.embedding_ranges],
            "spans": [{key: value for key, value in dataclasses.asdict(span).items() if value} for span in self.spans],
        }
        write_prompt(path, fields, self.input_embeddings, self.deepstack, self.position_ids)

    @classmethod
    def load(cls, path: str | Path) -> Prompt:
        """Read a prompt that `save` wrote. It is not checked: files may have been edited on purpose.

        Raises:
            PromptError: a file cannot be read, or its contents have the wrong form; the message names the file and the fault.
        """
        stored = read_prompt(path)
        spans = [Span(**{key: _tuple(value) for key, value in span.items()}) for span in stored.spans]
        return cls(
            stored.input_ids, stored.items, stored.embedding_ranges, spans, stored.position_ids, stored.deepstack
        )

    def replace(self, **changes) -> Prompt:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def lookup_ids(self) -> list[int]:
        """The ids to look up in the embedding table, with 0 inside ranges: placeholders there may be outside the vocabulary."""
        ids = list(self.input_ids)
        for start, stop in self.embedding_ranges:
            for position in range(max(start, 0), min(stop, len(ids))):  # ranges may be invalid
                ids[position] = 0
        return ids

    @property
    def bidirectional_ranges(self) -> list[Range]:
        """Sorted ranges of tokens that attend to each other: for each bidirectional span its `block`, or else its embedding range."""
        pairs = zip(self.embedding_ranges, self.spans, strict=False)
        return sorted({span.block or own for own, span in pairs if span.attention == "bidirectional"})

    @property
    def without_embeddings(self) -> Prompt:
        """The same ids and positions without injected embeddings and spans: the baseline that an injection is compared with."""
        return Prompt(self.input_ids, position_ids=self.position_ids)

    def findings(self, vocab_size: int | None = None, hidden_size: int | None = None) -> Iterator[Finding]:
        """Yield a finding for everything that prevents the prompt from running.

        Args:
            vocab_size, hidden_size: of the model; ids and widths are not checked against a size that is None.
        """
        return prompt_findings(self, vocab_size, hidden_size)

    def check(self, vocab_size: int | None = None, hidden_size: int | None = None) -> None:
        """Raise the first of `findings`, if any.

        Raises:
            EmbeddingRangeError: items, ranges or spans that do not fit.
            PromptError: any other finding.
        """
        check_prompt(self, vocab_size, hidden_size)

    def owned(self) -> Prompt:
        """Return a copy with tensors of its own, so that changing the caller's tensors afterwards does not change it."""
        copied = copy.copy(self)
        for name in ("input_embeddings", "deepstack"):
            object.__setattr__(copied, name, tuple(map(_copied, getattr(self, name))))
        object.__setattr__(copied, "position_ids", _copied(self.position_ids))
        return copied

    @property  # not cached: a caller may change a tensor in place
    def digest(self) -> str:
        """SHA-256 of everything that a model's result depends on: ids, items and deepstack with dtypes, ranges, attention, positions."""
        sha = hashlib.sha256()
        sha.update(repr((self.input_ids, self.embedding_ranges, self.bidirectional_ranges)).encode())
        positions = () if self.position_ids is None else (self.position_ids,)
        for tensor in (*self.input_embeddings, *self.deepstack, *positions):
            if not isinstance(tensor, torch.Tensor) or not has_storage(
                tensor
            ):  # an invalid prompt, which has a digest too
                sha.update(f"unreadable {type(tensor).__name__}".encode())
                continue
            sha.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()


@dataclass(frozen=True, eq=False)
class MultimodalPrompt(Prompt):
    """A prompt for an engine that runs the vision model itself: ids with placeholders, and processed images instead of rows.

    Attributes:
        multimodal: the outputs of the model's processor, one dict per group of images (`pixel_values` and related tensors); tensors
            of the same name are concatenated along their first axis.
    """

    multimodal: Sequence[dict[str, Any]] = ()

    @classmethod
    def of(cls, prompt: Prompt, multimodal: Sequence[dict[str, Any]]) -> MultimodalPrompt:
        """Return a copy of `prompt` with images added."""
        fields = {field.name: getattr(prompt, field.name) for field in dataclasses.fields(Prompt)}
        return cls(**fields, multimodal=tuple(multimodal))

    @property
    def lookup_ids(self) -> list[int]:
        return list(self.input_ids)

    def owned(self) -> MultimodalPrompt:
        copied = super().owned()
        groups = ({name: _copied(value) for name, value in group.items()} for group in self.multimodal)
        object.__setattr__(copied, "multimodal", tuple(groups))
        return cast(MultimodalPrompt, copied)

    @property
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


def _plain(values: Any) -> Any:
    """Return tensors and arrays as nested lists, anything else unchanged."""
    return values.tolist() if hasattr(values, "tolist") else values


def _as_tuple(name: str, values: Any) -> tuple:
    """Return a field as a tuple; None is empty."""
    if values is None:
        return ()
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping):
        try:
            return tuple(values)
        except TypeError:  # a tensor without dimensions
            pass
    raise EmbeddingRangeError(f"{name}={shortened(values)}: give a list with one entry per embedding range")


def _copied(value: Any) -> Any:
    """Return a copy of a tensor, anything else unchanged."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _strict(value: Any) -> int:
    """Convert an integer of any type to int; raise TypeError for True, 1.5 or "1"."""
    if isinstance(value, bool):
        raise TypeError("a bool is not a position")
    return operator.index(value)


def _integer(value: Any) -> Any:
    """Convert a value to int if it is an integer of any type; return anything else unchanged, for `findings` to report."""
    try:
        return _strict(value)
    except TypeError:
        return value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
