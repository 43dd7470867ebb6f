"""`workbench ...`: the same jobs without a browser."""

from __future__ import annotations

import argparse
import sys

from .cli_prompts import add_commands
from .errors import ModelError, PromptError, TraceError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 good, 1 a bug, a wrong prompt or pictures that failed, 2 bad input."""
    parser = argparse.ArgumentParser(prog="workbench", description="See where embeddings land, and judge engines.")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="fetch a model once and say where it is")
    fetch.add_argument("model")
    check = commands.add_parser("check", help="judge an engine against Transformers on one question")
    check.add_argument("model")
    check.add_argument("--engine", default="numba")
    check.add_argument("--dtype", default="float32")
    check.add_argument("--device", default="cpu")
    check.add_argument("--question", default="What is the capital of France?")
    bench = commands.add_parser("bench", help="speed of engine, trace and picture on this machine")
    bench.add_argument("--model", default="smollm2-135m")
    bench.add_argument("--rounds", type=int, default=5)
    bench.add_argument("--compare", action="store_true", help="comparing, recording and lint instead")
    bench.add_argument(
        "--batches", action="store_true", help="many requests at once beside Transformers' generate instead"
    )
    bench.add_argument(
        "--engines", nargs="+", help="engines side by side on spliced prompts instead (on a GPU: --device cuda)"
    )
    bench.add_argument("--dtype", default="bfloat16", help="with --engines")
    bench.add_argument("--device", default="cpu", help="with --engines")
    features = commands.add_parser("features", help="run a vision tower over pictures, ahead of time, into a store")
    features.add_argument("images", nargs="+", help="pictures, or folders of them")
    features.add_argument("--store", required=True, help="a folder, or an fsspec URL such as s3://bucket/features")
    features.add_argument("--model", default="digit-cards", help="built-in name, folder, or Hugging Face id")
    features.add_argument("--workers", type=int, default=0, help="Ray workers; 0 (the default) runs in this process")
    features.add_argument("--device", default="cpu")
    features.add_argument("--max-bytes", type=int, help="hold the store under this size")
    run = {"fetch": _fetch, "check": _check, "bench": _bench, "features": _features, **add_commands(commands)}
    options = parser.parse_args(arguments)
    try:
        return run[options.command](options)
    except (ModelError, PromptError, TraceError, ValueError, TypeError) as error:
        print(f"workbench: {error}", file=sys.stderr)
        return 2


def _fetch(options: argparse.Namespace) -> int:
    from .models import load_model

    model = load_model(options.model)
    print(f"{model.name} is ready in {model.path}")
    return 0


def _check(options: argparse.Namespace) -> int:
    """Inject the question's own rows over its middle half, so that splice and model are both judged."""
    from .compare import check_engine
    from .engines import open_engine
    from .models import load_model
    from .prompt import Prompt

    model = load_model(options.model)
    engine = open_engine(options.engine, model, dtype=options.dtype, device=options.device)
    ids = model.chat_ids(options.question)
    start, stop = len(ids) // 4, len(ids) * 3 // 4
    comparison = check_engine(engine, Prompt(ids, [model.token_rows(ids[start:stop])], [(start, stop)]))
    print(comparison)
    return int(comparison.verdict == "bug")


def _features(options: argparse.Namespace) -> int:
    from .vision.ahead import compute_features, find_pictures

    report = compute_features(
        find_pictures(options.images),
        options.model,
        options.store,
        workers=options.workers,
        device=options.device,
        max_bytes=options.max_bytes,
    )
    for path, reason in report.failed:
        print(f"workbench: {path}: {reason}", file=sys.stderr)
    print(report)
    return int(bool(report.failed))


def _bench(options: argparse.Namespace) -> int:
    from . import bench, bench_compare, bench_engine, bench_serving

    if options.engines:
        bench_serving.run(options.engines, options.model, options.dtype, options.device, options.rounds)
        return 0
    chosen = bench_engine if options.batches else bench_compare if options.compare else bench
    chosen.run(options.model, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
