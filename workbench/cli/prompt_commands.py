"""The commands `workbench lint|trace|references|compare|probe|record` and their options, for prompts and traces in files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from ..errors import PromptError


def add(commands: Any) -> dict[str, Any]:
    """Add the parsers to the subparsers `commands`; return `{command: function of the parsed options}`."""
    lint = commands.add_parser("lint", help="report what is wrong with a prompt, and what an engine would do with it")
    lint.add_argument("prompt", help="a file that Prompt.save wrote")
    lint.add_argument("--model", help="check ids, widths, norms and placeholders against it")
    lint.add_argument("--target", help="such as turbomind==0.18.0, lmdeploy-pytorch, vllm, sglang, transformers")
    lint.add_argument("--dtype", help="the dtype that the engine computes in")
    lint.add_argument("--max-prefill-token-num", type=int, help="tokens per prefill chunk")
    lint.add_argument("--strict", action="store_true", help="warnings count as errors")
    _json(lint)

    trace = commands.add_parser("trace", help="run an engine on a prompt and store its hidden states in a file")
    trace.add_argument("prompt")
    _engine(trace)
    trace.add_argument("--out", required=True, help="file.safetensors")
    trace.add_argument("--taps", nargs="+", default=["embed", "layers.*", "norm", "logits"], help="names or patterns")
    trace.add_argument("--positions", help="such as 0:40 or 3,17,-1; by default all")
    trace.add_argument("--max-bytes", type=int, help="fail if the trace would be larger than this")
    trace.add_argument(
        "--reference",
        metavar="DTYPE",
        help="record Transformers in float64 instead, and next to it the noise floor of DTYPE (file.floor-DTYPE.safetensors)",
    )
    trace.add_argument(
        "--streamed",
        action=argparse.BooleanOptionalAction,
        help="read the reference's weights layer by layer; by default if they are large",
    )

    references = commands.add_parser(
        "references", help="write the references of many prompts, for which the weights are read once"
    )
    references.add_argument("prompts", nargs="+", help="files that Prompt.save wrote")
    references.add_argument("--model", required=True)
    references.add_argument("--dtype", required=True, help="of the noise floors, such as bfloat16")
    references.add_argument("--out", required=True, help="a folder; files are named after the prompts")
    references.add_argument("--taps", nargs="+", default=["embed", "layers.*", "norm", "logits"])
    references.add_argument("--device", default="cpu")
    references.add_argument("--streamed", action=argparse.BooleanOptionalAction, help="as for trace")
    references.add_argument("--workers", type=int, default=0, help="Ray workers; 0 (the default) runs in this process")

    compare = commands.add_parser("compare", help="compare a recorded run with a recorded reference")
    compare.add_argument("reference", help="what `workbench trace --reference` wrote")
    compare.add_argument("run")
    compare.add_argument("--floor", help="the noise floor, if it is not next to the reference")
    compare.add_argument("--factor", type=float, help="allowed error, in noise floors")
    compare.add_argument("--prompt", help="the prompt's file, to explain which rows are misplaced (needs --model)")
    compare.add_argument("--model")
    compare.add_argument("--html", help="write a report with figures to this file")
    _json(compare)

    probe = commands.add_parser("probe", help="test whether an engine uses the embeddings it is given")
    probe.add_argument("prompt")
    _engine(probe)
    probe.add_argument("--only", nargs="+", help="names of the probes to run")
    _json(probe)

    record = commands.add_parser("record", help="run an engine and the reference and store both in a folder")
    record.add_argument("prompt", help="a file that Prompt.save wrote")
    _engine(record, default="turbomind")
    record.add_argument("--out", required=True, help="a folder, such as data/runs/my-model")
    record.add_argument("--taps", nargs="+", default=["depth.*", "layers.*", "norm"])
    record.add_argument("--positions", help="such as 0:40 or 3,17,-1; by default at most 24 informative ones")
    record.add_argument("--reference-device", default="cpu", help="where Transformers runs")
    record.add_argument("--no-invalid-prompts", action="store_true", help="do not run invalid prompts")
    return {
        "lint": _lint,
        "trace": _trace,
        "references": _references,
        "compare": _compare,
        "probe": _probe,
        "record": _record,
    }


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _engine(parser: argparse.ArgumentParser, default: str = "numba") -> None:
    parser.add_argument("--model", required=True)
    parser.add_argument("--engine", default=default)
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="the engine's own options, such as tp=2 max_batch_size=8",
    )


def _options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `open_engine`: dtype and device if given, and the --set values, parsed as JSON."""
    chosen: dict[str, Any] = {name: getattr(options, name) for name in ("dtype", "device") if getattr(options, name)}
    for each in options.set:
        name, equals, value = each.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set {each}: write NAME=VALUE")
        try:
            chosen[name] = json.loads(value)
        except ValueError:
            chosen[name] = value
    return chosen


def _open(options: argparse.Namespace) -> Any:
    from ..engines import open_engine
    from ..models import load_model

    return open_engine(options.engine, load_model(options.model), **_options(options))


def _lint(options: argparse.Namespace) -> int:
    """Return 0 if the prompt is clean, 1 if it is invalid or the target rejects it, ignores it or computes another."""
    from ..linting import lint
    from ..models import load_model
    from ..prompt import Prompt

    findings = lint(
        Prompt.load(options.prompt),
        load_model(options.model) if options.model else None,
        options.target,
        dtype=options.dtype,
        max_prefill_token_num=options.max_prefill_token_num,
    )
    changes = {"target-rejects", "target-ignores", "target-differs"}
    bad = [
        each
        for each in findings
        if each.severity == "error" or each.code in changes or (options.strict and each.severity == "warning")
    ]
    if options.json:
        _print({"findings": [dataclasses.asdict(each) for each in findings], "passed": not bad})
    else:
        print("\n".join(map(str, findings)) or "nothing found")
    return int(bool(bad))


def _trace(options: argparse.Namespace) -> int:
    from ..comparison.floor_runs import reference_runs
    from ..comparison.noise_floor import floor_path
    from ..comparison.reference_cache import reference_pair
    from ..comparison.reference_pass import ReferencePass
    from ..models import load_model
    from ..prompt import Prompt

    prompt = Prompt.load(options.prompt)
    positions = parse_positions(options.positions)
    out, source = Path(options.out).resolve(), Path(options.prompt).resolve()
    if out == source or (out.parent == source.parent and out.name.startswith(f"{source.name}.")):
        raise ValueError(f"--out {options.out} is a file of the prompt itself: choose another name")
    if options.reference is None:
        engine = _open(options)
        print(engine.plan_trace(prompt, options.taps, positions))
        print(engine.trace(prompt, options.taps, positions, path=options.out, max_bytes=options.max_bytes))
        return 0
    exact, rounded = reference_pair(
        load_model(options.model), options.reference, options.device or "cpu", options.streamed
    )
    print(exact.plan_trace(prompt, options.taps, positions))
    what = ReferencePass(prompt, options.taps, positions, path=Path(options.out), max_bytes=options.max_bytes)
    (found,) = reference_runs(exact, rounded, [what])
    expected, floor = found.trace, found.floor
    floor.save(floor_path(options.out, options.reference))
    print(f"{expected}\nnoise floor in {options.reference}: {floor_path(options.out, options.reference)}")
    return 0


def _references(options: argparse.Namespace) -> int:
    """Return 0 if all were written, 1 if a prompt could not be run."""
    from ..comparison.reference_files import write_references

    report = write_references(
        options.model, options.prompts, options.out, options.dtype, taps=options.taps, device=options.device,
        streamed=options.streamed, workers=options.workers,
    )  # fmt: skip
    for path, why in report.failed:
        print(f"{path}: {why}", file=sys.stderr)
    print(report)
    return int(bool(report.failed))


def _compare(options: argparse.Namespace) -> int:
    """Return 0 if the verdict is "same" or "noise", 1 if it is "drift" or "bug"."""
    from ..comparison import FACTOR, compare, compare_logits
    from ..comparison.diagnosis import explain
    from ..comparison.noise_floor import NoiseFloor, check_comparable, floor_path
    from ..models import load_model
    from ..prompt import Prompt
    from ..trace import Trace
    from .html_report import write_report

    expected, run = Trace.load(options.reference), Trace.load(options.run)
    check_comparable(expected, run, "run")
    floor = NoiseFloor.load(options.floor or floor_path(options.reference, run.provenance["dtype"]))
    comparison = compare(expected, run, floor=floor, factor=FACTOR if options.factor is None else options.factor)
    explanation = ""
    if comparison.first_divergence is not None:
        prompt = Prompt.load(options.prompt) if options.prompt else None
        model = load_model(options.model) if options.model else None
        if prompt is not None and prompt.digest != run.provenance["prompt"]:
            raise PromptError(f"{options.prompt} is not the prompt of {options.run}")
        explanation = str(explain(comparison, expected, run, prompt, model))
    logits = None
    if "logits" in expected and "logits" in run:
        logits = compare_logits(expected["logits"], run["logits"], expected.positions)
    if options.html:
        write_report(options.html, comparison, expected, run, explanation)
    if options.json:
        first = comparison.first_divergence
        _print(
            {
                "verdict": comparison.verdict,
                "first_divergence": dataclasses.asdict(first) if first else None,
                "explanation": explanation or None,
                "first_divergence_metrics": _metrics(comparison, expected, run),
                "logits": logits.summary() if logits is not None else None,
                "taps": comparison.table(),
                "spans": comparison.by_span(),
            }
        )
    else:
        print(comparison)
        if explanation:
            print(explanation)
        if logits is not None:
            print(f"next tokens: {logits}")
    return int(comparison.failed)


def _metrics(comparison: Any, expected: Any, run: Any) -> dict[str, float] | None:
    """Every metric of the first wrong state, including units in the last place."""
    from ..comparison.metrics import measure

    first = comparison.first_divergence
    if first is None:
        return None
    at = int((comparison.positions == first.token).nonzero()[0])
    found = measure(run[first.tap][at : at + 1], expected[first.tap][at : at + 1], comparison.dtype)
    return {name: float(value[0]) for name, value in found.items()}


def _probe(options: argparse.Namespace) -> int:
    """Return 0 if every probe passes, else 1."""
    from ..comparison.probes import probe
    from ..engines import open_engine
    from ..models import load_model
    from ..prompt import Prompt

    prompt = Prompt.load(options.prompt)
    chunked = None
    if options.engine == "numba":
        extra = {**_options(options), "max_prefill_token_num": max(len(prompt) // 4, 1)}
        chunked = open_engine("numba", load_model(options.model), **extra)
    report = probe(_open(options), prompt, only=options.only, chunked=chunked)
    if options.json:
        _print({"passed": report.passed, "results": [dataclasses.asdict(each) for each in report.results]})
    else:
        print(report)
    return int(not report.passed)


def _record(options: argparse.Namespace) -> int:
    from ..models import load_model
    from ..prompt import Prompt
    from ..recording import record

    prompt, positions = Prompt.load(options.prompt), parse_positions(options.positions)
    kept = list(range(len(prompt)))[positions] if isinstance(positions, slice) and options.positions else None
    recording = record(
        options.engine,
        load_model(options.model),
        prompt,
        options.out,
        taps=options.taps,
        positions=kept if isinstance(positions, slice) else positions,
        reference_device=options.reference_device,
        invalid_prompts=not options.no_invalid_prompts,
        **_options(options),
    )
    print(f"recorded in {recording.folder}")
    return int(recording.compare().failed)


def parse_positions(text: str | None) -> slice | list[int]:
    """Parse positions: `"0:40"` is a slice, `"3,17,-1"` a list, and None all positions.

    Raises:
        ValueError: the text is neither a slice nor a list of integers.
    """
    if text is None:
        return slice(None)
    try:
        if ":" in text:
            start, stop = text.split(":")
            return slice(int(start) if start else None, int(stop) if stop else None)
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--positions {text}: write a slice such as 0:40, or a list such as 3,17,-1") from error


def _print(value: Any) -> None:
    json.dump(_plain(value), sys.stdout, indent=1, ensure_ascii=False, allow_nan=False)
    print()


def _plain(value: Any) -> Any:
    """Replace NaN and infinities by strings, because JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value
