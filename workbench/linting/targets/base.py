"""A target (an engine at a version) and the effect of giving it a prompt: the types that the rules of each engine use."""

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
    """An engine at a version, for which rules exist; `name` is a key of `LATEST`."""

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
            dropped, placeholder tokens are used), "rejects" (it computes nothing).
        prompt: the prompt that it computes; None if it rejects the prompt, or if the result is undefined.
        notes: the reasons, one sentence each.
        status: what the caller gets on a rejection, such as an exception or a status; empty otherwise.
        hazards: findings on what goes wrong only with some settings of the target.
    """

    outcome: Outcome
    prompt: Prompt | None
    notes: tuple[str, ...] = ()
    status: str = ""
    hazards: tuple[Finding, ...] = ()

    @classmethod
    def rejects(cls, note: str, status: str) -> Effect:
        """An effect for a prompt that the target rejects: `note` is the reason, `status` is what the caller gets."""
        return cls("rejects", None, (note,), status)

    @classmethod
    def ignores(cls, prompt: Prompt, note: str) -> Effect:
        """An effect for a target that drops the embeddings and looks up the placeholder tokens instead: `note` is the reason."""
        bare = prompt.replace(input_embeddings=(), embedding_ranges=(), spans=(), deepstack=())
        return cls("ignores", bare, (note,))


class Changes:
    """Collects what a target changes in a prompt, with a note on each change; `effect` returns the result.

    Attributes:
        prompt: the prompt with all changes so far.
        notes: one sentence per change.
    """

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.notes: list[str] = []

    def drop(self, note: str, **fields) -> None:
        """Replace fields of the prompt as the target does, and add a note."""
        self.prompt = self.prompt.replace(**fields)
        self.notes.append(note)

    def drop_positions(self, note: str) -> None:
        """Drop position_ids, which the target does not take; add the note unless they are 0, 1, 2, ..., which it uses anyway."""
        positions = self.prompt.position_ids
        if positions is None:
            return
        if positions.ndim == 1 and torch.equal(positions.long(), torch.arange(len(positions))):
            self.prompt = self.prompt.replace(position_ids=None)
        else:
            self.drop(note, position_ids=None)

    def drop_deepstack(self) -> None:
        """Drop deepstack features, which the target does not take."""
        if self.prompt.deepstack:
            self.drop("deepstack features cannot be passed", deepstack=())

    def causal(self) -> None:
        """Remove every span, for a target whose attention is causal, and note it if one was bidirectional."""
        if self.prompt.bidirectional_ranges:
            self.notes.append("attention is causal everywhere: bidirectional spans are not supported")
        if self.prompt.spans:
            self.prompt = self.prompt.replace(spans=())

    def effect(self, hazards: tuple[Finding, ...] = ()) -> Effect:
        """Return the effect: "differs" if any change was noted, else "accepts"."""
        return Effect("differs" if self.notes else "accepts", self.prompt, tuple(self.notes), hazards=hazards)


def has_vision(model: Model | None) -> bool:
    """Whether a model takes images or audio; False without a model."""
    if model is None:
        return False
    return any(getattr(model.config, part, None) is not None for part in ("vision_config", "audio_config"))


def rejects_whole_prompt(prompt: Prompt, model: Model | None) -> Effect | None:
    """The rejection of a prompt that cannot be spliced, else None; for targets that take one embedding per prompt token from the caller.

    Such targets do not splice: the caller looks up the token embeddings and splices the items in.
    """
    reason = splice_error(prompt, model)
    if reason is None:
        return None
    note = f"it takes rows for the whole prompt, which cannot be spliced: {reason}"
    return Effect.rejects(note, "your own splice fails")


def splice_error(prompt: Prompt, model: Model | None) -> str | None:
    """Why ids, items and ranges cannot be spliced into one embedding per token; None if they can."""
    sizes = (model.text_config.vocab_size, model.text_config.hidden_size) if model else ()
    return next((fault.message for fault in prompt.findings(*sizes)), None)
