"""A recorded run: an engine beside the reference on one prompt, in a folder that anyone can open without that engine or a GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .compare.floor import NoiseFloor
from .compare.logits import compare_text
from .compare.run import reference, shared_taps
from .compare.verdict import Comparison, compare
from .engines import open_engine
from .engines.api import Engine
from .engines.messages import EngineOutput, GenerationConfig
from .errors import TraceError
from .misuse import MISUSES, observe
from .models import Model
from .probes import probe
from .prompt import Prompt
from .prompt_files import load_prompt
from .trace import Trace
from .whole_files import write_whole

FORMAT = "workbench-recording-1"
_MOST_POSITIONS = 24
_UNCHECKED = ("turbomind",)
"""Engines that can be opened with `check=False`, and whose rules are in `targets`."""


@dataclass(frozen=True)
class Recording:
    """What `record` wrote.

    Attributes:
        prompt: what was run.
        truth, run: traces of the float64 reference and of the engine, memory-mapped.
        floor: the reference's noise floor in the engine's dtype.
        record: answers, verdict, probes, misuses and versions, as plain values.
    """

    folder: Path
    prompt: Prompt
    truth: Trace
    run: Trace
    floor: NoiseFloor
    record: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Recording:
        """Open a recorded run.

        Raises:
            TraceError: a folder that is none, or a damaged file in it. PromptError: its prompt.
        """
        folder = Path(folder)
        path = folder / "record.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise TraceError(f"{path} cannot be read: {error}") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise TraceError(f"{path} is no recording of this version ({FORMAT}): record it again")
        return cls(
            folder,
            load_prompt(folder / "prompt.json"),
            Trace.load(folder / "truth.safetensors"),
            Trace.load(folder / "run.safetensors"),
            NoiseFloor.load(folder / "floor.safetensors"),
            record,
        )

    def compare(self) -> Comparison:
        """Judge the recorded states again."""
        return compare(self.truth, self.run, floor=self.floor)


def record(
    kind: str,
    model: Model,
    prompt: Prompt,
    folder: str | Path,
    *,
    taps: Sequence[str] = ("depth.*", "layers.*", "norm"),
    positions: Sequence[int] | None = None,
    reference_device: str = "cpu",
    new_tokens: int = 24,
    misuses: bool = True,
    say: Callable[[str], object] = print,
    **options: Any,
) -> Recording:
    """Run an engine and the reference on a prompt and keep what they computed.

    Args:
        kind, options: as for `open_engine`; "turbomind" gets `depth_sweep=True`.
        positions: tokens to keep; the default keeps at most 24, at the edges of ranges, inside them and at the end.
        reference_device: where the reference runs.
        misuses: also hand the engine prompts that are wrong, each in a process of its own. Needs two items, and rules for the engine.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = choose_positions(prompt) if positions is None else list(positions)
    if kind == "turbomind":
        options.setdefault("depth_sweep", True)
    engine = open_engine(kind, model, **options)
    dtype = str(engine.dtype).removeprefix("torch.")
    chosen = shared_taps(engine, taps)
    try:
        say(f"engine: {engine.plan_trace(prompt, chosen, kept)}")
        run = engine.trace(prompt, chosen, kept, path=folder / "run.safetensors")
        truth_engine, floor_engine = (reference(model, each, reference_device) for each in ("float64", dtype))
        truth = truth_engine.trace(prompt, chosen, kept, path=folder / "truth.safetensors")
        floor = NoiseFloor.measure(truth, floor_engine.noise_floor(prompt, chosen, kept))
        floor.save(folder / "floor.safetensors")
        prompt.save(folder / "prompt.json")
        comparison = compare(truth, run, floor=floor)
        say(str(comparison))
        config = GenerationConfig(max_new_tokens=new_tokens, logprobs=5)
        answers = {"engine": engine.generate(prompt, config), "reference": floor_engine.generate(prompt, config)}
        text = compare_text(answers["reference"], answers["engine"])
        say(str(text))
        report = probe(engine, prompt)
        say(str(report))
        made: dict[str, Any] = {
            "format": FORMAT,
            "engine": engine.capabilities.name,
            "engine_version": str(getattr(engine, "version", "")),
            "model": model.name,
            "dtype": dtype,
            "device": run.provenance["device"],
            "versions": run.provenance["versions"],
            "verdict": str(comparison),
            "taps": comparison.table(),
            "spans": comparison.by_span(),
            "answers": {name: _answer(model, output) for name, output in answers.items()},
            "texts": str(text),
            "probes": [dataclasses.asdict(result) for result in report.results],
        }
    finally:
        close = getattr(engine, "close", None)
        if close is not None:
            close()
    if misuses and kind in _UNCHECKED and len(prompt.input_embeddings) > 1:
        made["misuses"] = _misuses(kind, model, prompt, str(made["engine_version"]), reference_device, options, say)
    write_whole(folder / "record.json", f"{json.dumps(made, indent=1, ensure_ascii=False)}\n".encode())
    return Recording.load(folder)


def choose_positions(prompt: Prompt) -> list[int]:
    """At most 24 tokens that tell most: the first, both sides of every range's edges, some inside, and the last ones."""
    length = len(prompt)
    wanted = [0, length - 1, length - 2]
    for start, stop in prompt.embedding_ranges:
        wanted += [start - 1, start, start + 1, (start + stop) // 2, stop - 2, stop - 1, stop]
    chosen = list(dict.fromkeys(position for position in wanted if 0 <= position < length))[:_MOST_POSITIONS]
    rest = sorted(set(range(length)) - set(chosen))
    places = torch.linspace(0, len(rest) - 1, min(_MOST_POSITIONS - len(chosen), len(rest))).long().tolist()
    return sorted([*chosen, *(rest[place] for place in places)])


def _answer(model: Model, output: EngineOutput) -> dict[str, Any]:
    return {
        "token_ids": output.token_ids,
        "text": model.tokenizer.decode(output.token_ids, skip_special_tokens=True),
        "status": output.status.name,
    }


def _misuses(
    kind: str,
    model: Model,
    prompt: Prompt,
    version: str,
    device: str,
    options: dict[str, Any],
    say: Callable[[str], object],
) -> list[dict[str, Any]]:
    rows = []
    plain = {name: value for name, value in options.items() if name != "depth_sweep"}
    target = f"{kind}=={version}" if version else kind
    engine: Engine | None = None
    for misuse in MISUSES:
        if engine is None:
            engine = open_engine(kind, model, isolated=True, check=False, **plain)
        try:
            seen = observe(engine, prompt, target, misuse, device)
        except BaseException:
            engine.close()  # type: ignore[attr-defined]
            raise
        say(f"{misuse}: predicted {seen.predicted}, {seen.seen} ({seen.evidence})")
        rows.append(dataclasses.asdict(seen))
        if seen.seen == "crashes" or misuse == "wrong width":  # it died, or its memory cannot be trusted any more
            engine.close()  # type: ignore[attr-defined]
            engine = None
    if engine is not None:
        engine.close()  # type: ignore[attr-defined]
    return rows
