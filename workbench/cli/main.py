"""The `workbench` command: `fetch`, `check`, `features`; `prompt_commands.py`, `engine_commands.py`, `import_command.py`, `rollout_command.py` and `lab.py` have the others.

Modules are imported by the command that needs them, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import sys

from ..errors import ModelError, PromptError, TraceError
from . import engine_commands, import_command, lab, prompt_commands, rollout_command


def main(arguments: list[str] | None = None) -> int:
    """Run the command given by `arguments` (by default the process's own).

    Returns:
        the exit status: 0 for success; 1 if a bug or an invalid prompt was found or images failed; 2 for bad input
        (the error is printed to stderr).
    """
    parser = argparse.ArgumentParser(prog="workbench", description="See where embeddings land, and check engines.")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download a model once and print where it is")
    fetch.add_argument("model")
    check = commands.add_parser("check", help="compare an engine with Transformers on one question")
    check.add_argument("model")
    check.add_argument("--engine", default="numba")
    check.add_argument("--dtype", default="float32")
    check.add_argument("--device", default="cpu")
    check.add_argument("--question", default="What is the capital of France?")
    features = commands.add_parser("features", help="compute the features of images ahead of time, into a store")
    features.add_argument("images", nargs="+", help="images, or folders of images")
    features.add_argument("--store", required=True, help="a folder, or an fsspec URL such as s3://bucket/features")
    features.add_argument("--model", default="digit-cards", help="built-in name, folder, or Hugging Face id")
    features.add_argument("--workers", type=int, default=0, help="Ray workers; 0 (the default) runs in this process")
    features.add_argument("--device", default="cpu")
    features.add_argument("--max-bytes", type=int, help="keep the store below this size")
    run = {
        "fetch": _fetch,
        "check": _check,
        "features": _features,
        **prompt_commands.add(commands),
        **engine_commands.add(commands),
        **import_command.add(commands),
        **rollout_command.add(commands),
        **lab.add(commands),
    }
    options = parser.parse_args(arguments)
    try:
        return run[options.command](options)
    except (ModelError, PromptError, TraceError, ValueError, TypeError) as error:
        print(f"workbench: {error}", file=sys.stderr)
        return 2


def _fetch(options: argparse.Namespace) -> int:
    from ..models import load_model

    model = load_model(options.model)
    print(f"{model.name} is ready in {model.path}")
    return 0


def _check(options: argparse.Namespace) -> int:
    """Check an engine on a question.

    The rows of the middle half of its tokens are injected as embeddings, to check splicing too.
    """
    from ..comparison import check_engine
    from ..engines import open_engine
    from ..models import load_model
    from ..prompt import Prompt

    model = load_model(options.model)
    ids = model.chat_ids(options.question)
    start, stop = len(ids) // 4, len(ids) * 3 // 4
    with open_engine(options.engine, model, dtype=options.dtype, device=options.device) as engine:
        comparison = check_engine(engine, Prompt(ids, [model.token_rows(ids[start:stop])], [(start, stop)]))
    print(comparison)
    return int(comparison.failed)


def _features(options: argparse.Namespace) -> int:
    from ..vision.precompute import compute_features, find_images

    report = compute_features(
        find_images(options.images),
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


if __name__ == "__main__":
    sys.exit(main())
