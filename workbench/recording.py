"""Recorded runs: an engine and the reference on one prompt, in a folder that can be opened without that engine or a GPU."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .atomic_write import atomic_folder
from .checksums import checksum
from .comparison.check import shared_taps
from .comparison.floor_runs import reference_runs
from .comparison.logits import compare_text
from .comparison.noise_floor import NoiseFloor
from .comparison.probes import probe
from .comparison.reference_cache import reference_pair
from .comparison.reference_pass import ReferencePass
from .comparison.verdict import Comparison, compare
from .engines import open_engine
from .engines.types import EngineOutput, GenerationConfig
from .errors import TraceError
from .faults import Fault, faults_of, observe
from .models import Model
from .prompt import Prompt
from .schema import read_json
from .trace import Trace

FORMAT = "workbench-recording-3"
_OURS = re.compile(
    r"record\.json|prompt\.json(\.[0-9a-f]{16}\.safetensors)?|(reference|run|floor)\.safetensors|\.ipynb_checkpoints"
)
_MAX_POSITIONS = 24
_UNCHECKED = ("turbomind",)
"""Engines that run invalid prompts if opened with `check=False`, and whose behaviour `linting.targets` predicts."""


@dataclass(frozen=True)
class Recording:
    """A recorded run, as written by `record`.

    Attributes:
        folder: where it is stored.
        prompt: the prompt that was run.
        reference, run: traces of the float64 reference and of the engine, read from disk tap by tap.
        floor: the reference's noise floor in the engine's dtype.
        record: answers, verdict, probes, invalid prompts and versions, as plain JSON values.
    """

    folder: Path
    prompt: Prompt
    reference: Trace
    run: Trace
    floor: NoiseFloor
    record: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Recording:
        """Open a recorded run.

        Raises:
            TraceError: the folder is not a recording, or a file in it is damaged.
            PromptError: its prompt cannot be read.
        """
        folder = Path(folder)
        path = folder / "record.json"
        record = read_json(path, "a recording", TraceError)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise TraceError(f"{path} is not a recording of this version ({FORMAT}): record it again")
        if record.get("checksum") != _record_checksum(record):
            raise TraceError(f"{path} was damaged or changed: copy the folder again, or record it again")
        prompt = Prompt.load(folder / "prompt.json")
        reference, run = Trace.load(folder / "reference.safetensors"), Trace.load(folder / "run.safetensors")
        floor = NoiseFloor.load(folder / "floor.safetensors")
        for name, part in (("reference", reference), ("run", run), ("floor", floor)):
            if part.provenance["prompt"] != prompt.digest:
                raise TraceError(
                    f"{folder}: {name}.safetensors is of another prompt than prompt.json (SHA-256 {part.provenance['prompt'][:12]}, "
                    f"not {prompt.digest[:12]}): copy the folder again, or record it again"
                )
        return cls(folder, prompt, reference, run, floor, record)

    def compare(self) -> Comparison:
        """Compare the recorded states of engine and reference again and return the verdict."""
        return compare(self.reference, self.run, floor=self.floor)


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
    invalid_prompts: bool = True,
    log: Callable[[str], object] = print,
    **options: Any,
) -> Recording:
    """Run an engine and the reference on a prompt, compare them, and store the results in a folder.

    Args:
        kind, options: as for `open_engine`; "turbomind" is opened with `depth_sweep=True` unless given otherwise.
        folder: a new or empty folder, or an earlier recording, which is replaced as a whole once this one is complete.
        taps: names or patterns of the states to store, as far as the engine has them.
        positions: positions to store; None chooses at most 24: at the edges of ranges, inside them, and at the end.
        reference_device: the device of the reference.
        new_tokens: maximum number of tokens in the recorded answers.
        invalid_prompts: also run invalid prompts, in a separate process that may crash. Skipped unless the prompt has
            at least two items and the engine is "turbomind".
        log: called with each line of progress.

    Returns:
        the recording, opened from the folder.

    Raises:
        TraceError: the folder cannot be written, or contains other files.
        EmbeddingRangeError, PromptError, ModelError: the engine cannot run the prompt, or cannot be opened.
    """
    target = Path(folder)
    _check_target(target)
    with _writing(target), atomic_folder(target) as work:
        _record(kind, model, prompt, work, taps, positions, reference_device, new_tokens, invalid_prompts, log, options)
    return Recording.load(target)


def _record(
    kind: str,
    model: Model,
    prompt: Prompt,
    folder: Path,
    taps: Sequence[str],
    positions: Sequence[int] | None,
    reference_device: str,
    new_tokens: int,
    invalid_prompts: bool,
    log: Callable[[str], object],
    options: dict[str, Any],
) -> None:
    """Write the files of a recording into the empty folder `folder`; other arguments as for `record`."""
    kept = telling_positions(prompt) if positions is None else list(positions)
    if kind == "turbomind":
        options.setdefault("depth_sweep", True)
    with open_engine(kind, model, **options) as engine:
        dtype = str(engine.dtype).removeprefix("torch.")
        chosen = shared_taps(engine, taps)
        log(f"engine: {engine.plan_trace(prompt, chosen, kept)}")
        run = engine.trace(prompt, chosen, kept, path=folder / "run.safetensors")
        exact, rounded = reference_pair(model, dtype, reference_device)
        what = ReferencePass(prompt, chosen, kept, path=folder / "reference.safetensors")
        (found,) = reference_runs(exact, rounded, [what])
        expected, floor = found.trace, found.floor
        floor.save(folder / "floor.safetensors")
        prompt.save(folder / "prompt.json")
        comparison = compare(expected, run, floor=floor)
        log(str(comparison))
        config = GenerationConfig(max_new_tokens=new_tokens, logprobs=5)
        answers = {"engine": engine.generate(prompt, config), "reference": rounded.generate(prompt, config)}
        text = compare_text(answers["reference"], answers["engine"])
        log(str(text))
        report = probe(engine, prompt)
        log(str(report))
        version = str(getattr(engine, "version", ""))
        recorded: dict[str, Any] = {
            "format": FORMAT,
            "engine": engine.capabilities.name,
            "engine_version": version,
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
    if invalid_prompts and kind in _UNCHECKED and len(prompt.input_embeddings) > 1:
        recorded["invalid_prompts"] = _observe_all(kind, model, prompt, version, reference_device, options, log)
    recorded["checksum"] = _record_checksum(recorded)
    (folder / "record.json").write_text(f"{json.dumps(recorded, indent=1, ensure_ascii=False)}\n", encoding="utf-8")


def _check_target(folder: Path) -> None:
    """Raise TraceError if a folder contains anything but an earlier recording, which would be lost."""
    with _writing(folder):
        if folder.is_symlink():
            raise OSError("it is a link, which is not replaced")
        found = sorted(each.name for each in folder.iterdir()) if folder.exists() else []
    others = [name for name in found if not _OURS.fullmatch(name)]
    if others:
        raise TraceError(
            f"{folder} contains {others[0]}, which is not part of a recording: give an empty or a new folder"
        )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TraceError(f"the recording cannot be written to {folder}: {error}. Choose another folder") from error


def _record_checksum(record: dict[str, Any]) -> str:
    plain = {name: value for name, value in record.items() if name != "checksum"}
    return checksum(json.dumps(plain, sort_keys=True).encode())


def telling_positions(prompt: Prompt) -> list[int]:
    """Return at most 24 informative positions: the first, both sides of every range edge, some inside ranges, and the last ones."""
    length = len(prompt)
    wanted = [0, length - 1, length - 2]
    for start, stop in prompt.embedding_ranges:
        wanted += [start - 1, start, start + 1, (start + stop) // 2, stop - 2, stop - 1, stop]
    chosen = list(dict.fromkeys(position for position in wanted if 0 <= position < length))[:_MAX_POSITIONS]
    rest = sorted(set(range(length)) - set(chosen))
    even = torch.linspace(0, len(rest) - 1, min(_MAX_POSITIONS - len(chosen), len(rest))).long().tolist()
    return sorted([*chosen, *(rest[index] for index in even)])


def _answer(model: Model, output: EngineOutput) -> dict[str, Any]:
    return {
        "token_ids": output.token_ids,
        "text": model.tokenizer.decode(output.token_ids, skip_special_tokens=True),
        "status": output.status.name,
    }


def _observe_all(
    kind: str,
    model: Model,
    prompt: Prompt,
    version: str,
    device: str,
    options: dict[str, Any],
    log: Callable[[str], object],
) -> list[dict[str, Any]]:
    """Record what the engine does with the valid prompt and with every invalid one."""
    plain = {name: value for name, value in options.items() if name != "depth_sweep"}
    target = f"{kind}=={version}" if version else kind
    rows = []
    pending: list[Fault | None] = [None, *faults_of("invalid prompt")]
    while pending:
        with open_engine(kind, model, isolated=True, check=False, **plain) as engine:
            usable = True
            while pending and usable:
                seen = observe(engine, prompt, target, pending.pop(0), device)
                log(f"{seen.fault}: predicted {seen.predicted}, {seen.seen} ({seen.evidence})")
                rows.append(dataclasses.asdict(seen))
                # After a crash the engine is gone; after rows of a wrong width its memory cannot be trusted.
                usable = seen.seen != "crashes" and seen.fault != "wrong width"
    return rows
