"""Your own engine: a function that computes logits, and hidden states if it has them, as an engine of the workbench."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch

from ..errors import ModelError
from ..models import Model
from ..models.options import parse_dtype
from ..prompt import Prompt
from .base import Engine, Sink
from .cancellation import Cancellation
from .sampling import generate, stop_tokens
from .types import Capabilities, EngineOutput, GenerationConfig

PAGE = "workbench/engines/README.md"
"""Where bringing an engine is explained."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
Compute = Callable[[Prompt], Any]
"""A function from a prompt to logits `[seq, vocab]`, or to `{tap: states [seq, width]}`; without "logits" it cannot generate."""


def engine_from(
    compute: Compute,
    model: Model,
    *,
    dtype: str | torch.dtype = "float32",
    name: str = "yours",
    device: str = "cpu",
    bidirectional_spans: bool = False,
    mrope: bool = False,
    deepstack: bool = False,
) -> FunctionEngine:
    """Return an engine that computes by calling your function, for `check_engine`, `probe`, `explore` and the other tools.

    Args:
        compute: takes a `Prompt`; returns logits `[seq, vocab]`, or `{tap: [seq, width]}` with any of the taps "embed", "layers.0", ...,
            "layers.0.attention", "layers.0.mlp", ..., "norm", "logits" (without which it cannot generate). It is called once here, with a prompt of two tokens, to
            learn which taps it has.
        model: what it computes; the reference reads it.
        dtype: in which it computes: the noise floor is that of this dtype.
        name: shown in verdicts and figures.
        device: on which it computes; only shown.
        bidirectional_spans, mrope, deepstack: whether it honours bidirectional spans, `position_ids` `[3, seq]` and deepstack features;
            prompts with those are refused otherwise.

    Raises:
        ModelError: the function fails, or returns something else.
        ValueError: an unknown dtype.

    ```python
    def mine(prompt):
        rows = model.token_rows(prompt.lookup_ids)
        for item, (start, stop) in zip(prompt.input_embeddings, prompt.embedding_ranges):
            rows[start:stop] = item
        out = network(inputs_embeds=rows[None], output_hidden_states=True)
        return {"embed": out.hidden_states[0][0], "logits": out.logits[0]}

    print(workbench.check_engine(workbench.engine_from(mine, model), prompt))
    ```
    """
    return FunctionEngine(compute, model, dtype, name, device, bidirectional_spans, mrope, deepstack)


class FunctionEngine(Engine):
    """The engine that `engine_from` returns. It generates by running all tokens again for each new one."""

    def __init__(
        self,
        compute: Compute,
        model: Model,
        dtype: str | torch.dtype,
        name: str,
        device: str,
        bidirectional_spans: bool,
        mrope: bool,
        deepstack: bool,
    ) -> None:
        if not callable(compute):
            raise ModelError(
                f"engine_from needs a function from a prompt to logits, not {type(compute).__name__} (see {PAGE})"
            )
        if not isinstance(model, Model):
            raise ModelError(
                f"engine_from needs a model from workbench.load_model, not {type(model).__name__} (see {PAGE})"
            )
        super().__init__()
        self._compute, self.model, self._name = compute, model, name
        self.dtype = parse_dtype(dtype, DTYPES, name)
        self.device = torch.device(device)
        self._supports = {
            "bidirectional_spans": bidirectional_spans,
            "mrope": 3 if mrope else 0,
            "deepstack": deepstack,
        }
        self._taps: tuple[str, ...] | None = None
        self._taps = tuple(sorted(self.states(Prompt([0, 1])), key=_order))

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(self._name, self._taps or (), DTYPES, (str(self.device),), **self._supports)  # type: ignore[arg-type]

    def states(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """Call the function and check what it returns: `{tap: [seq, width]}` in the engine's dtype.

        Raises:
            ModelError: it fails, or returns no tensors of these shapes, or other taps than at first.
        """
        try:
            with torch.no_grad():
                given = self._compute(prompt)
        except Exception as error:
            raise ModelError(f"{self._name} failed on {len(prompt)} tokens: {type(error).__name__}: {error}") from error
        states = dict(given) if isinstance(given, Mapping) else {"logits": given}
        if not states:
            raise ModelError(
                f"{self._name} returned no states: return logits [{len(prompt)}, vocab], or {{tap: states}} (see {PAGE})"
            )
        for tap, state in states.items():
            self._check(tap, state, prompt)
        if self._taps is not None and set(states) != set(self._taps):
            raise ModelError(
                f"{self._name} returned the taps {', '.join(states)}, at first {', '.join(self._taps)}: return the same ones for every prompt"
            )
        return {tap: state.detach().to(self.dtype) for tap, state in states.items()}

    def _check(self, tap: str, state: Any, prompt: Prompt) -> None:
        config = self.model.text_config
        layers = config.num_hidden_layers
        if _known(tap, layers) is None:
            raise ModelError(
                f"{self._name} returned the tap {tap!r}, which is none of embed, layers.0 to layers.{layers - 1} (also with .attention "
                f"and .mlp), norm and logits (see {PAGE})"
            )
        width = config.vocab_size if tap == "logits" else config.hidden_size
        if not isinstance(state, torch.Tensor) or not state.is_floating_point():
            what = f"a tensor of {state.dtype}" if isinstance(state, torch.Tensor) else type(state).__name__
            raise ModelError(
                f"{self._name} returned {what} as {tap}: return a floating-point tensor [{len(prompt)}, {width}]"
            )
        if tuple(state.shape) != (len(prompt), width):
            raise ModelError(
                f"{self._name} returned {tap} of shape {list(state.shape)}: for {len(prompt)} tokens it must be [{len(prompt)}, {width}]"
                f"{', without the dimension of the batch' if state.ndim == 3 else ''}"
            )

    def run_trace(self, prompt: Prompt, taps: list[str], positions: torch.Tensor, sink: Sink) -> None:
        states = self.states(prompt)
        for tap in taps:
            sink(tap, states[tap][positions.to(states[tap].device)])

    def run_generation(
        self, prompt: Prompt, config: GenerationConfig, cancelled: Cancellation
    ) -> Generator[EngineOutput, None, None]:
        if "logits" not in self.capabilities.taps:
            raise ModelError(
                f"{self._name} returns no logits, so it cannot generate: return them as 'logits' (see {PAGE})"
            )
        if config.output_last_hidden_state and "norm" not in self.capabilities.taps:
            raise ModelError(f"{self._name} returns no states after the final norm: return them as 'norm' (see {PAGE})")
        yield from generate(_Rerun(self, prompt), prompt, config, stop_tokens(self.model, config))


class _Rerun:
    """A request whose every step runs all tokens."""

    def __init__(self, engine: FunctionEngine, prompt: Prompt) -> None:
        self._engine, self._prompt = engine, prompt

    def prefill(self, all_logits: bool) -> tuple[torch.Tensor, torch.Tensor]:
        states = self._engine.states(self._prompt)
        logits = states["logits"]
        return logits if all_logits else logits[-1:], states.get("norm", logits[:, :0])

    def decode(self, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        before = self._prompt
        positions = before.position_ids
        if positions is not None:
            positions = torch.cat([positions, positions.amax().expand(*positions.shape[:-1], 1) + 1], dim=-1)
        self._prompt = before.replace(input_ids=[*before.input_ids, token], position_ids=positions)
        logits, hidden = self.prefill(all_logits=False)
        return logits, hidden[-1:]


def require_engine(engine: object, function: str) -> None:
    """Raise TypeError if `engine`, an argument of `function`, is not an `Engine`, naming what it lacks."""
    if isinstance(engine, Engine):
        return
    lacking = [name for name in ("trace", "generate", "capabilities", "model", "dtype") if not _has(engine, name)]
    what = f", which has no {', '.join(lacking)}" if lacking else ""
    raise TypeError(
        f"{function} needs an engine, not {type(engine).__name__}{what}: open one with workbench.open_engine, or wrap a function from a "
        f"prompt to logits with workbench.engine_from(function, model) ({PAGE} shows how in ten lines)"
    )


def _has(engine: object, name: str) -> bool:
    with contextlib.suppress(Exception):
        return hasattr(engine, name)
    return False


def _known(tap: str, layers: int) -> tuple[int, int] | None:
    """Where a tap is computed, as a pair that sorts; None for an unknown name."""
    ends = {"embed": (-1, 0), "norm": (layers, 0), "logits": (layers, 1)}
    found = re.fullmatch(r"layers\.(\d+)(\.attention|\.mlp)?", tap) if isinstance(tap, str) else None
    if found is None:
        return ends.get(tap)
    number = int(found[1])
    return (number, {".attention": 0, ".mlp": 1, None: 2}[found[2]]) if number < layers else None


def _order(tap: str) -> tuple[int, int]:
    found = _known(tap, 1 << 30)
    assert found is not None
    return found
