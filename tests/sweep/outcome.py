"""What the reference makes of one class: right, refused by name, or a fault."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

import workbench
from workbench.engines.transformers.reference import TransformersReference

from .own_engine import own_engine_faults
from .small_configs import small_network
from .streaming import streaming_faults

IDS = [5, 9, 3, 77, 23, 60, 41, 8, 13, 99, 101, 55, 56, 57, 40, 33, 21, 90, 91, 34]
RANGE = (6, 11)
NEW_TOKENS = 6
# The class's own float64 run still casts to float32 inside.
TOLERANCES = {"float64": 3e-6, "float32": 5e-5}
# Classes whose hidden_states start after the first layer, not before it.
STATES_AFTER = ("FalconMambaForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM", "RwkvForCausalLM")


@dataclass(frozen=True)
class Outcome:
    """One row of the table.

    Attributes:
        kind: "right", "refused", "wrong", "raw" (an error that is not the project's) or "not built" (no small configuration).
        detail: of a right one, the taps and the verdict; else the message.
    """

    name: str
    kind: str
    detail: str


def judge(class_name: str, model_type: str) -> Outcome:
    """Compare the reference with the class's own forward: states, logits with and without injected rows, greedy tokens, verdict."""
    try:
        network = small_network(class_name, model_type)
    except Exception as error:
        return Outcome(class_name, "not built", _line(error))
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        try:
            model = workbench.load_model(folder)
            faults = list(_faults(model, class_name))
            try:
                faults += streaming_faults(model, workbench.Prompt(IDS))
                streamed = ""
            except workbench.ModelError as error:
                streamed = f"; not streamed: {_line(error).replace(folder, 'the checkpoint')}"
            ours = own_engine_faults(model, workbench.Prompt(IDS))
            faults += ours or []
            detail = _detail(model) + streamed + ("; numba engine" if ours == [] else "")
        except (workbench.ModelError, workbench.PromptError) as error:
            return Outcome(class_name, "refused", _line(error).replace(folder, "the checkpoint"))
        except Exception as error:
            return Outcome(class_name, "raw", _line(error))
    return Outcome(class_name, "wrong", "; ".join(faults)) if faults else Outcome(class_name, "right", detail)


def _faults(model: workbench.Model, class_name: str) -> Iterator[str]:
    """Where the reference differs from the class."""
    truths: dict[Any, Any] = {}
    for dtype, tolerance in TOLERANCES.items():
        engine = TransformersReference(model, dtype=dtype)
        truth, wide = _truth(truths, class_name, model)
        tolerance = tolerance if wide else TOLERANCES["float32"]
        prompt = workbench.Prompt(IDS)
        taps = [tap for tap in engine.capabilities.taps if not tap.startswith("depth")]
        trace = engine.trace(prompt, taps)
        truth = partial(truth, use_cache=False, **_beside(engine, truth))
        expected = _states(truth(input_ids=torch.tensor([IDS]), output_hidden_states=True), class_name)
        layers = sum(tap.count(".") == 1 for tap in taps)
        if layers:
            expected.pop(f"layers.{layers - 1}", None)  # Transformers gives the last one after the norm only
        for tap, state in expected.items():
            if tap in trace and not (error := _off(trace[tap], state)) < tolerance:
                yield f"{dtype} {tap} is off by {error:.1e}"
        for number in range(layers):
            if (attention := f"layers.{number}.attention") in trace:
                before = trace[f"layers.{number - 1}" if number else "embed"]
                total = before.double() + trace[attention].double() + trace[f"layers.{number}.mlp"].double()
                if not (error := _off(total, trace[f"layers.{number}"])) < tolerance:
                    yield f"{dtype} attention and MLP of layer {number} do not sum up: off by {error:.1e}"
        if not (error := _off(engine.logit_lens(trace["norm"], normed=True), trace["logits"])) < tolerance:
            yield f"{dtype} logit lens of the norm is off by {error:.1e}"
        if layers:
            try:
                lens = engine.logit_lens(trace[f"layers.{layers - 1}"])
            except workbench.ModelError:  # refused: the class has no single norm before its head
                lens = trace["logits"]
            if not (error := _off(lens, trace["logits"])) < tolerance:
                yield f"{dtype} logit lens of the last layer is off by {error:.1e}"
        yield from _injected(engine, truth, tolerance)
    greedy = engine.generate(prompt, workbench.GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True)).token_ids
    greedy, tokens, generated = (
        _before_padding(each) for each in (greedy, _greedy(truth, engine), _generated(truth.func))
    )
    if greedy not in (tokens, generated):
        yield f"greedy tokens {greedy} instead of {tokens} (uncached) or {generated} (generate)"
    verdict = workbench.check_engine(engine, prompt).verdict
    if verdict not in ("same", "noise"):
        yield f"its own float32 run is a {verdict}"


def _injected(engine: TransformersReference, truth: Any, tolerance: float) -> Iterator[str]:
    """Logits of a prompt with injected rows, against `inputs_embeds`; of classes that need ids beside them nothing is compared."""
    ids = torch.tensor([IDS])
    if engine._structure.injection_fault is not None:
        return
    table = truth.func.get_input_embeddings()
    rows = torch.randn(RANGE[1] - RANGE[0], table.weight.shape[-1], generator=torch.Generator().manual_seed(1)) * 0.1
    embeds = table(ids).clone()
    embeds[0, slice(*RANGE)] = rows.to(embeds)
    try:
        expected = truth(inputs_embeds=embeds).logits[0]
        looked_up, given = (truth(**each).logits for each in ({"input_ids": ids}, {"inputs_embeds": table(ids)}))
    except Exception:  # it takes ids only
        return
    if not torch.allclose(looked_up, given, rtol=1e-4, atol=1e-6):
        return  # it computes something else from ids, too, which it cannot get from embeddings
    prompt = workbench.Prompt(IDS, [rows], [RANGE])
    if not (error := _off(engine.trace(prompt, ["logits"])["logits"], expected)) < tolerance:
        yield f"{engine.dtype} logits with injected rows are off by {error:.1e}"


@torch.no_grad()
def _truth(cache: dict[Any, Any], class_name: str, model: workbench.Model) -> tuple[Any, bool]:
    """The class's own model, and whether it runs in float64; some classes do not."""
    if not cache:
        network = getattr(transformers, class_name).from_pretrained(
            model.path, dtype=torch.float64, experts_implementation="eager"
        )
        network = network.eval().requires_grad_(False)
        try:
            network(input_ids=torch.tensor([IDS]), use_cache=False)
            cache["all"] = network, True
        except Exception:
            cache["all"] = network.float(), False
    return cache["all"]


def _beside(engine: TransformersReference, truth: Any, length: int = len(IDS)) -> dict[str, torch.Tensor]:
    """What a class needs beside ids to run text alone: positions for M-RoPE, a causal mask where its own is for images only."""
    given = {}
    if engine.capabilities.mrope:
        given["position_ids"] = torch.arange(length).expand(3, 1, length)
    if engine._structure.needs_mask:
        dtype = next(truth.parameters()).dtype
        given["attention_mask"] = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    return given


def _states(out: Any, class_name: str) -> dict[str, torch.Tensor]:
    """The class's own states, by tap."""
    states = {"logits": out.logits[0]}
    hidden = getattr(out, "hidden_states", None)
    if hidden is None:
        return states
    hidden = [each[0] for each in hidden if each.ndim == 3]
    if len(hidden) < len(out.hidden_states):  # several streams
        return states
    states["norm"] = hidden[-1]
    if class_name in STATES_AFTER:
        return states | {f"layers.{i}": state for i, state in enumerate(hidden[:-1])}
    return states | {"embed": hidden[0]} | {f"layers.{i}": state for i, state in enumerate(hidden[1:])}


@torch.no_grad()
def _greedy(truth: Any, engine: TransformersReference) -> list[int]:
    """Greedy tokens by the class's own forward on the whole sequence."""
    ids = list(IDS)
    for _ in range(NEW_TOKENS):
        given = _beside(engine, truth.func, len(ids))
        ids.append(int(truth(input_ids=torch.tensor([ids]), **given).logits[0, -1].argmax()))
    return ids[len(IDS) :]


def _before_padding(tokens: list[int]) -> list[int]:
    """RoBERTa's positions skip padding, and do so differently with and without a cache."""
    return tokens[: tokens.index(0)] if 0 in tokens else tokens


@torch.no_grad()
def _generated(truth: Any) -> list[int]:
    """Greedy tokens by Transformers' `generate`, with the class's cache: not in every class are they those of the uncached forward."""
    try:
        out = truth.generate(
            torch.tensor([IDS]), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0
        )
    except Exception:  # it cannot generate from text alone
        return []
    return out[0, len(IDS) :].tolist()


def _detail(model: workbench.Model) -> str:
    engine = TransformersReference(model)
    taps, fault = engine.capabilities.taps, engine._structure.injection_fault
    return _taps(taps) + (f"; rows cannot be injected: {fault}" if fault else "")


def _taps(taps: tuple[str, ...]) -> str:
    layers = sum(tap.startswith("layers.") and tap.count(".") == 1 for tap in taps)
    parts = sum(tap.endswith(".attention") for tap in taps)
    if not layers:
        return "norm and logits only"
    return (
        "all taps"
        if parts == layers
        else f"all taps, but parts of {parts} of {layers} layers"
        if parts
        else "no attention and MLP taps"
    )


def _off(state: torch.Tensor, expected: torch.Tensor) -> float:
    if state.shape != expected.shape:
        return float("inf")
    state, expected = state.double(), expected.double()
    return float((state - expected).norm() / expected.norm().clamp(min=1e-30))


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = "" if isinstance(error, workbench.ModelError) else f"{type(error).__name__}: "
    return name + text
