"""Which known quantity is this? Compare foreign states with the reference's taps and with what those are usually confused with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..errors import TraceError
from ..models import Model
from ..prompt import Prompt
from ..trace import Trace
from .metrics import relative_error, unit_roundoff
from .noise_floor import NoiseFloor
from .reference_cache import reference_run
from .verdict import FACTOR

_LEAST_ROUNDOFFS = 4
"""The smallest tolerance, in unit roundoffs of the states' dtype."""


@dataclass(frozen=True)
class Identification:
    """What a tensor is.

    Attributes:
        name: of the tensor.
        tap: the tap that it equals within rounding; None if it is something else.
        what: in words: the tap, a quantity beside it, or the nearest tap of one that equals nothing.
        error: its largest relative error to that, over the tokens.
    """

    name: str
    tap: str | None
    what: str
    error: float

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def identify(
    model: Model, prompt: Prompt, states: Mapping[str, torch.Tensor], *, dtype: str = "float32", device: str = "cpu"
) -> list[Identification]:
    """Find out what each of another program's states is.

    Args:
        states: by name, `[seq, width]` of the whole prompt.
        dtype: what they were computed in: its rounding is allowed.

    Raises:
        TraceError: a state whose rows are not the prompt's tokens, or contains NaN.
        PromptError, ModelError: the reference cannot run the prompt.
    """
    for name, state in states.items():
        if state.ndim != 2 or len(state) != len(prompt):
            raise TraceError(
                f"{name} is {list(state.shape)}: for a prompt of {len(prompt)} tokens give [{len(prompt)}, width]"
            )
        if not torch.isfinite(state).all():
            raise TraceError(f"{name} contains NaN or infinity: it equals nothing")
    trace, floor = reference_run(
        model, prompt, dtype, ("embed", "layers.*", "layers.*.*", "norm", "logits"), device=device
    )
    return [_identified(name, state.double(), trace, floor, model, prompt, dtype) for name, state in states.items()]


def _identified(
    name: str, state: torch.Tensor, trace: Trace, floor: NoiseFloor, model: Model, prompt: Prompt, dtype: str
) -> Identification:
    nearest, least = "", float("inf")
    for tap, what, expected, tolerance in _candidates(trace, floor, model, prompt, dtype):
        if expected.shape != state.shape:
            continue
        error = _largest(state, expected)
        if error <= tolerance:
            return Identification(name, tap, what, error)
        if tap is not None and error < least:
            nearest, least = tap, error
    if not nearest:
        widths = sorted({trace[tap].shape[1] for tap in trace})
        return Identification(
            name, None, f"nothing known has its width {state.shape[1]}; taps have {widths}", float("nan")
        )
    for tap in trace:
        if trace[tap].shape == state.shape:
            moved = _moved(state, trace[tap].double(), FACTOR * _rounding(floor, tap, dtype))
            if moved is not None:
                return Identification(name, None, f"{tap}, {moved}", least)
    return Identification(name, None, f"nothing known; {nearest} is nearest, and {least:.1e} off", least)


def _largest(state: torch.Tensor, expected: torch.Tensor) -> float:
    """Over all tokens: hidden state 0 and the text's own embeddings differ only inside ranges."""
    return float(relative_error(state, expected).max())


def _rounding(floor: NoiseFloor, tap: str, dtype: str) -> float:
    """The largest noise floor of a tap's tokens."""
    return max(float(floor.errors[tap].max()), _LEAST_ROUNDOFFS * unit_roundoff(dtype))


def _candidates(
    trace: Trace, floor: NoiseFloor, model: Model, prompt: Prompt, dtype: str
) -> Iterator[tuple[str | None, str, torch.Tensor, float]]:
    """Yield a tap's name (or None), words, states and tolerance: the taps first, then what they are confused with."""
    layers = sum(tap.count(".") == 1 for tap in trace)
    for tap in trace:
        yield tap, tap, trace[tap].double(), FACTOR * _rounding(floor, tap, dtype)
    for number in range(layers):
        before = "embed" if number == 0 else f"layers.{number - 1}"
        attention, mlp = (f"layers.{number}.{part}" for part in ("attention", "mlp"))
        if attention not in trace:
            continue
        tolerance = FACTOR * max(_rounding(floor, tap, dtype) for tap in (before, attention, mlp))
        yield (
            None,
            f"{before} plus {attention}: the residual stream between attention and MLP, not after the layer",
            trace[before].double() + trace[attention].double(),
            tolerance,
        )
        yield (
            None,
            f"{attention} plus {mlp}: what layer {number} adds, without the residual stream",
            trace[attention].double() + trace[mlp].double(),
            tolerance,
        )
    size = len(model.embedding_table)
    if all(0 <= token < size for token in prompt.input_ids):
        own = model.token_rows(list(prompt.input_ids)).double()
        tolerance = FACTOR * _LEAST_ROUNDOFFS * unit_roundoff(dtype)
        yield None, "the embeddings of the prompt's ids, without the injected rows", own, tolerance
        yield (
            None,
            "rows of the embedding table, unscaled",
            model.embedding_table[list(prompt.input_ids)].double(),
            tolerance,
        )


def _moved(state: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str | None:
    """How the rows of a state lie otherwise than expected; None if they do not."""
    for by in (1, -1, 2, -2):
        mine, theirs = (state[by:], expected[:-by]) if by > 0 else (state[:by], expected[-by:])
        if len(mine) and _largest(mine, theirs) <= tolerance:
            return f"{abs(by)} token{'s' * (abs(by) > 1)} too {'late' if by > 0 else 'early'}"
    if _largest(state.flip(0), expected) <= tolerance:
        return "in reverse order"
    factor = float((state * expected).sum() / expected.square().sum())
    if abs(factor) > 1e-6 and _largest(state / factor, expected) <= tolerance:
        return f"times {factor:.4g}"
    return None
