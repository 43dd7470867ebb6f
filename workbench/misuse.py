"""What an engine does with prompts that are wrong, against what the rules about it predict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .compare.run import reference
from .compare.verdict import compare
from .engines.api import Engine
from .errors import EngineDied, ModelError
from .prompt import Prompt
from .targets import Target, effect
from .trace import Trace


def _unsorted(prompt: Prompt) -> Prompt:
    return prompt.replace(
        embedding_ranges=prompt.embedding_ranges[::-1], input_embeddings=prompt.input_embeddings[::-1], spans=()
    )


def _overlapping(prompt: Prompt) -> Prompt:
    (a, b), *rest = prompt.embedding_ranges
    start, stop = rest[0]
    return prompt.replace(embedding_ranges=[(a, b), (b - 1, b - 1 + stop - start), *rest[1:]], spans=())


def _out_of_bounds(prompt: Prompt) -> Prompt:
    *rest, (start, stop) = prompt.embedding_ranges
    return prompt.replace(embedding_ranges=[*rest, (len(prompt) - 1, len(prompt) - 1 + stop - start)], spans=())


def _short(prompt: Prompt) -> Prompt:
    first, *rest = prompt.input_embeddings
    return prompt.replace(input_embeddings=[first[:-1], *rest])


def _long(prompt: Prompt) -> Prompt:
    first, *rest = prompt.input_embeddings
    return prompt.replace(input_embeddings=[torch.cat([first, first[:1]]), *rest])


def _exchanged_lengths(prompt: Prompt) -> Prompt:
    """One row too many in the first item and one too few in the second: the totals agree."""
    first, second, *rest = prompt.input_embeddings
    return prompt.replace(input_embeddings=[torch.cat([first, first[:1]]), second[:-1], *rest])


def _item_too_many(prompt: Prompt) -> Prompt:
    return prompt.replace(input_embeddings=[*prompt.input_embeddings, prompt.input_embeddings[0][:1]])


def _reversed(prompt: Prompt) -> Prompt:
    (start, stop), *rest = prompt.embedding_ranges
    return prompt.replace(embedding_ranges=[(stop, start), *rest], spans=())


def _off_by_one(prompt: Prompt) -> Prompt:
    return prompt.replace(embedding_ranges=[(start + 1, stop + 1) for start, stop in prompt.embedding_ranges])


def _nan(prompt: Prompt) -> Prompt:
    first, *rest = prompt.input_embeddings
    broken = first.clone()
    broken[0, 0] = torch.nan
    return prompt.replace(input_embeddings=[broken, *rest])


def _wrong_width(prompt: Prompt) -> Prompt:
    return prompt.replace(input_embeddings=[item[:, :-8].contiguous() for item in prompt.input_embeddings])


def _two_widths(prompt: Prompt) -> Prompt:
    first, *rest = prompt.input_embeddings
    return prompt.replace(input_embeddings=[first, *(item[:, :-8].contiguous() for item in rest)])


MISUSES: dict[str, Callable[[Prompt], Prompt]] = {
    "none": lambda prompt: prompt,
    "unsorted": _unsorted,
    "overlapping": _overlapping,
    "out of bounds": _out_of_bounds,
    "a row too few": _short,
    "a row too many": _long,
    "row counts exchanged": _exchanged_lengths,
    "an item too many": _item_too_many,
    "reversed range": _reversed,
    "off by one": _off_by_one,
    "NaN": _nan,
    "wrong width": _wrong_width,
    "two widths": _two_widths,
}
"""Prompts made wrong; each takes a sound prompt with two items."""


@dataclass(frozen=True)
class Observation:
    """One row of the table.

    Attributes:
        predicted: "accepts", "differs", "ignores", "rejects", or "undefined" where nobody can say what is computed.
        why: the rules' note.
        seen: "computes what was predicted", "rejects", "computes something else", "no finite numbers", "crashes".
        evidence: the error, or the verdict against the reference on the prompt that the rules say is computed.
        agrees: whether what was seen is what was predicted; None where nothing was.
    """

    misuse: str
    predicted: str
    why: str
    seen: str
    evidence: str
    agrees: bool | None


def observe(engine: Engine, prompt: Prompt, target: str, misuse: str, device: str = "cpu") -> Observation:
    """Hand a wrong prompt to an engine that checks nothing, and hold what comes out against the rules.

    Args:
        engine: opened with `check=False`, in a process of its own where a crash must not end this one.
        target: the engine and version whose rules predict.
        device: where the reference runs.
    """
    wrong = MISUSES[misuse](prompt)
    predicted = effect(wrong, Target.parse(target), engine.model)
    outcome = predicted.outcome if predicted.prompt is not None or predicted.outcome == "rejects" else "undefined"
    why = "; ".join(predicted.notes)
    try:
        trace = engine.trace(wrong, ["norm"])
    except EngineDied as error:
        return Observation(misuse, outcome, why, "crashes", str(error), None if outcome == "undefined" else False)
    except (ModelError, ValueError, TypeError) as error:
        status = predicted.status.rsplit(".", 1)[-1]
        as_told = not status.isupper() or status in str(error)
        agrees = None if outcome == "undefined" else outcome == "rejects" and as_told
        return Observation(misuse, outcome, why, "rejects", str(error), agrees)
    if not torch.isfinite(trace["norm"]).all():
        agrees = None if outcome == "undefined" else misuse == "NaN"
        return Observation(misuse, outcome, why, "no finite numbers", "states hold NaN or infinity", agrees)
    if predicted.prompt is None:
        return Observation(
            misuse,
            outcome,
            why,
            "computes something else",
            "finished as if nothing were wrong",
            None if outcome == "undefined" else False,
        )
    dtype = str(engine.dtype).removeprefix("torch.")
    truth = reference(engine.model, "float64", device).trace(predicted.prompt, ["norm"])
    floor = reference(engine.model, dtype, device).noise_floor(predicted.prompt, ["norm"])
    same_prompt = {key: truth.provenance[key] for key in ("prompt", "ranges", "modalities")}
    seen = compare(truth, Trace(trace, trace.positions, {**trace.provenance, **same_prompt}), floor=floor)
    good = seen.verdict != "bug"
    words = "computes what was predicted" if good else "computes something else"
    return Observation(misuse, outcome, why, words, str(seen), good)
