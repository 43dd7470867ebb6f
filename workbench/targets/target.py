"""A target: an engine at a version, and what it makes of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from packaging.version import InvalidVersion, Version

from ..findings import Finding
from ..models import Model
from ..prompt import Prompt

LATEST = {
    "turbomind": "0.18.0",
    "lmdeploy-pytorch": "0.18.0",
    "vllm": "0.33.0",
    "sglang": "0.5.23",
    "transformers": "5.23.0",
}
"""The newest version of each that the rules were read from."""

Outcome = Literal["accepts", "differs", "ignores", "rejects"]


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
    """What a target makes of a prompt.

    Attributes:
        outcome: "accepts" (it computes this prompt), "differs" (it runs and computes another one), "ignores" (the embeddings are
            dropped, placeholders are used), "rejects" (it computes nothing).
        prompt: what it computes; None where it rejects, and where nobody can say.
        notes: why, one sentence each.
        status: what a rejection looks like to the caller.
        hazards: what goes wrong only under a setting.
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
    """Collects what a target leaves out of a prompt, and says so."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.notes: list[str] = []

    def drop(self, note: str, **fields) -> None:
        """Set fields of the prompt to what the target takes them for."""
        self.prompt = self.prompt.replace(**fields)
        self.notes.append(note)

    def drop_positions(self, note: str) -> None:
        """Positions cannot be handed over, which matters unless they are 0, 1, 2, ... anyway."""
        positions = self.prompt.position_ids
        if positions is None:
            return
        if positions.ndim == 1 and torch.equal(positions.long(), torch.arange(len(positions))):
            self.prompt = self.prompt.replace(position_ids=None)
        else:
            self.drop(note, position_ids=None)

    def drop_deepstack(self) -> None:
        """Features for the first layers cannot be handed over."""
        if self.prompt.deepstack:
            self.drop("deepstack features cannot be handed over", deepstack=())

    def causal(self) -> None:
        """Bidirectional spans are not known."""
        if self.prompt.bidirectional:
            self.notes.append("attention is causal everywhere: bidirectional spans are not known")
        if self.prompt.spans:
            self.prompt = self.prompt.replace(spans=())

    def effect(self, hazards: tuple[Finding, ...] = ()) -> Effect:
        """What is left."""
        return Effect("differs" if self.notes else "accepts", self.prompt, tuple(self.notes), hazards=hazards)


def has_vision(model: Model | None) -> bool:
    """Whether a model sees pictures or hears sounds; None when no model is given counts as not."""
    if model is None:
        return False
    return any(getattr(model.config, part, None) is not None for part in ("vision_config", "audio_config"))


def whole_prompt_refused(prompt: Prompt, model: Model | None) -> Effect | None:
    """For targets that take rows for the whole prompt, spliced by the caller: what happens where that cannot be done, else None."""
    reason = unsplicable(prompt, model)
    if reason is None:
        return None
    note = f"it takes rows for the whole prompt, and they cannot be put together: {reason}"
    return Effect.rejects(note, "your own splice fails")


def unsplicable(prompt: Prompt, model: Model | None) -> str | None:
    """Why a caller cannot turn ids, items and ranges into the rows of a whole prompt, or None."""
    sizes = (model.text_config.vocab_size, model.text_config.hidden_size) if model else ()
    return next((fault.message for fault in prompt.faults(*sizes)), None)
