"""A target (an engine at a version) and the effect of giving it a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from packaging.version import InvalidVersion, Version

from ...models import Model
from ...prompt import Finding, Prompt

LATEST = {
    "turbomind": "0.18.0",
    "lmdeploy-pytorch": "0.18.0",
    "vllm": "0.33.0",
    "sglang": "0.5.23",
    "transformers": "5.23.0",
}
"""The newest version of each engine whose source the rules were taken from."""

Outcome = Literal["accepts", "differs", "ignores", "rejects"]


@dataclass(frozen=True)
class Target:
    """An engine at a version."""

    name: str
    version: Version

    @classmethod
    def parse(cls, text: str) -> Target:
        """Parse `"turbomind==0.18.0"`, or a bare name for the newest version that these rules cover.

        Raises:
            ValueError: an engine without rules, or an invalid version.
        """
        name, _, version = text.partition("==")
        if name not in LATEST:
            raise ValueError(
                f"no rules for target {name!r}: choose one of {', '.join(LATEST)}, optionally with ==VERSION"
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
    """What a target does with a prompt.

    Attributes:
        outcome: "accepts" (it computes this prompt), "differs" (it runs and computes another one), "ignores" (the embeddings are
            dropped, placeholders are used), "rejects" (it computes nothing).
        prompt: what it computes; None if it rejects the prompt, or if the result is undefined.
        notes: why, one sentence each.
        status: what a rejection looks like to the caller.
        hazards: what goes wrong only with some setting.
    """

    outcome: Outcome
    prompt: Prompt | None
    notes: tuple[str, ...] = ()
    status: str = ""
    hazards: tuple[Finding, ...] = ()

    @classmethod
    def rejects(cls, note: str, status: str) -> Effect:
        """Nothing is computed."""
        return cls("rejects", None, (note,), status)

    @classmethod
    def ignores(cls, prompt: Prompt, note: str) -> Effect:
        """The embeddings are dropped; placeholder tokens are looked up."""
        bare = prompt.replace(input_embeddings=(), embedding_ranges=(), spans=(), deepstack=())
        return cls("ignores", bare, (note,))


class Changes:
    """Collects what a target changes in a prompt, with a note on each change."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.notes: list[str] = []

    def drop(self, note: str, **fields) -> None:
        """Replace fields of the prompt as the target does, and add a note."""
        self.prompt = self.prompt.replace(**fields)
        self.notes.append(note)

    def drop_positions(self, note: str) -> None:
        """Drop positions, which the target cannot be given; a note is added unless they are 0, 1, 2, ... anyway."""
        positions = self.prompt.position_ids
        if positions is None:
            return
        if positions.ndim == 1 and torch.equal(positions.long(), torch.arange(len(positions))):
            self.prompt = self.prompt.replace(position_ids=None)
        else:
            self.drop(note, position_ids=None)

    def drop_deepstack(self) -> None:
        """Drop features for the first layers, which the target cannot be given."""
        if self.prompt.deepstack:
            self.drop("deepstack features cannot be passed", deepstack=())

    def causal(self) -> None:
        """Drop spans: the target does not support bidirectional ones."""
        if self.prompt.bidirectional_ranges:
            self.notes.append("attention is causal everywhere: bidirectional spans are not supported")
        if self.prompt.spans:
            self.prompt = self.prompt.replace(spans=())

    def effect(self, hazards: tuple[Finding, ...] = ()) -> Effect:
        """Return the effect of the changes."""
        return Effect("differs" if self.notes else "accepts", self.prompt, tuple(self.notes), hazards=hazards)


def has_vision(model: Model | None) -> bool:
    """Whether a model takes images or audio; False without a model."""
    if model is None:
        return False
    return any(getattr(model.config, part, None) is not None for part in ("vision_config", "audio_config"))


def rejects_whole_prompt(prompt: Prompt, model: Model | None) -> Effect | None:
    """For targets that take rows for the whole prompt, spliced by the caller: the rejection if it cannot be spliced, else None."""
    reason = splice_error(prompt, model)
    if reason is None:
        return None
    note = f"it takes rows for the whole prompt, which cannot be spliced: {reason}"
    return Effect.rejects(note, "your own splice fails")


def splice_error(prompt: Prompt, model: Model | None) -> str | None:
    """Why a caller cannot turn ids, items and ranges into the rows of a whole prompt, or None."""
    sizes = (model.text_config.vocab_size, model.text_config.hidden_size) if model else ()
    return next((fault.message for fault in prompt.findings(*sizes)), None)
