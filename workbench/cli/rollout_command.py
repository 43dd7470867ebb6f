"""`workbench rollout`: judge recorded log-probabilities."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any


def add(commands: Any) -> dict[str, Callable[[argparse.Namespace], int]]:
    """Add the command to a parser; return its function by name."""
    rollout = commands.add_parser(
        "rollout", help="judge the log-probabilities that an engine reported for the tokens it generated"
    )
    rollout.add_argument(
        "runs", help="JSON lines with prompt_token_ids, token_ids and logprobs (or the names of other programs)"
    )
    rollout.add_argument("--model", required=True)
    rollout.add_argument("--dtype", default="bfloat16", help="what the engine computed in")
    rollout.add_argument("--device", default="cpu", help="of the reference")
    rollout.add_argument("--json", action="store_true", help="print one JSON object per run instead of text")
    return {"rollout": _rollout}


def _rollout(options: argparse.Namespace) -> int:
    from ..comparison.rollout import judge_rollout
    from ..comparison.rollout_files import read_rollouts
    from ..models import load_model

    model = load_model(options.model)
    failed = False
    for run in read_rollouts(options.runs):
        found = judge_rollout(model, run, dtype=options.dtype, device=options.device)
        failed |= found.failed
        if options.json:
            fields = {
                "run": found.name, "verdict": found.verdict, "reads_as": found.reads_as, "first": found.first,
                "reported": _plain(found.reported), "expected": _plain(found.expected), "floors": _plain(found.floors),
            }  # fmt: skip
            print(json.dumps(fields))
        else:
            print(found)
    return int(failed)


def _plain(values: Any) -> list[float | None]:
    """Numbers as JSON has them: null where there is none, or where it is infinite."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
