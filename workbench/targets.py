"""What other engines do with a prompt, by version: reject it, shift rows, or ignore embeddings without a word.

The rules were read from LMDeploy's sources (0.1 to 0.18); those of TurboMind's checks were also seen on the real engine,
0.18.0 on an H100.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from packaging.version import InvalidVersion, Version

from .prompt import Prompt, is_item

LATEST = {"turbomind": "0.18.0", "lmdeploy-pytorch": "0.18.0", "transformers": "5.23.0"}


@dataclass(frozen=True)
class Target:
    """An engine at a version."""

    name: str
    version: Version

    @classmethod
    def parse(cls, text: str) -> Target:
        """`"turbomind==0.18.0"`, or a bare name for the newest version these rules know.

        Raises:
            ValueError: an engine without rules, or a version that is none.
        """
        name, _, version = text.partition("==")
        if name not in LATEST:
            raise ValueError(
                f"no rules for target {name!r}: choose one of {', '.join(LATEST)}, with ==VERSION if you like"
            )
        try:
            return cls(name, Version(version or LATEST[name]))
        except InvalidVersion as error:
            raise ValueError(
                f"target {text!r}: {version!r} is not a version; write it like {name}=={LATEST[name]}"
            ) from error

    def before(self, version: str) -> bool:
        """Whether this version is older than `version`."""
        return self.version < Version(version)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Effect:
    """What a target makes of a prompt: `prompt` is what it computes, None where it rejects; `notes` say why."""

    prompt: Prompt | None
    notes: tuple[str, ...] = ()


def effect(prompt: Prompt, target: Target) -> Effect:
    """Work out what `target` computes from `prompt`."""
    if target.name == "transformers" or not prompt.input_embeddings:
        return Effect(prompt)
    if target.name == "lmdeploy-pytorch":
        if target.before("0.5.0"):
            return Effect(_placeholders(prompt), ("the PyTorch engine takes no embeddings before 0.5.0",))
        if target.before("0.6.5"):
            return Effect(prompt)
        return Effect(
            _placeholders(prompt),
            (
                "since 0.6.5 the PyTorch engine runs vision inside; embeddings are swallowed without a word and the "
                "placeholder tokens are used: hand it images (`multimodal`), or use TurboMind",
            ),
        )
    return _turbomind(prompt, target)


def _placeholders(prompt: Prompt) -> Prompt:
    return prompt.replace(input_embeddings=(), embedding_ranges=(), spans=())


def _turbomind(prompt: Prompt, target: Target) -> Effect:
    rejection = _turbomind_rejects(prompt)
    if rejection and target.before("0.12"):
        return Effect(
            _placeholders(prompt),
            (f"{rejection}: before 0.12 that is logged only, and the placeholder tokens are used",),
        )
    if rejection:
        return Effect(None, (f"{rejection}: rejected, which surfaces as ResponseType.SESSION_NOT_EXIST",))
    notes = []
    ranges = [(start, stop) for start, stop in prompt.embedding_ranges if stop > start]
    if len({item.shape[1] for item in prompt.input_embeddings}) > 1:
        return Effect(None, ("items differ in width; TurboMind does not check widths and reads past buffers",))
    rows, items, used = torch.cat(list(prompt.input_embeddings)), [], 0
    for start, stop in ranges:
        items.append(rows[used : used + stop - start])
        used += stop - start
    if [len(item) for item in prompt.input_embeddings] == [stop - start for start, stop in ranges]:
        items = list(prompt.input_embeddings)
    else:
        notes.append(
            f"all items are laid end to end ({len(rows)} rows) and ranges take rows in order ({used}): rows shift from one "
            "item into the next"
        )
    changed = prompt.replace(
        input_embeddings=items,
        embedding_ranges=ranges,
        spans=(),
    )
    if prompt.bidirectional:
        notes.append("attention is causal everywhere; bidirectional spans are not known")
    if prompt.position_ids is not None and not target.before("0.16"):
        changed = changed.replace(position_ids=None)
        notes.append("since 0.16 positions cannot be handed over; plain 0, 1, 2, ... are used")
    return Effect(changed, tuple(notes))


def _turbomind_rejects(prompt: Prompt) -> str | None:
    for number, item in enumerate(prompt.input_embeddings):
        if not is_item(item):
            return f"input_embeddings[{number}] is no dense tensor [rows, hidden]"
    end_before = 0
    for number, (start, stop) in enumerate(prompt.embedding_ranges):
        if start < end_before:
            return f"embedding_ranges[{number}] begins at {start}, before {end_before} where the one before ends"
        if stop > len(prompt):
            return f"embedding_ranges[{number}] ends at {stop}, past the prompt of {len(prompt)} tokens"
        end_before = stop
    needed = sum(max(stop - start, 0) for start, stop in prompt.embedding_ranges)
    have = sum(len(item) for item in prompt.input_embeddings)
    return f"the ranges need {needed} rows, the items have {have}" if have < needed else None
