"""`workbench import`: another program's recorded states as a trace file that `workbench compare` takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add(commands: Any) -> dict[str, Callable[[argparse.Namespace], int]]:
    """Add the command to a parser; return its function by name."""
    parser = commands.add_parser(
        "import", help="name the states that another program recorded, and store them as a trace"
    )
    parser.add_argument("states", help="a .safetensors, .npz, .npy or .pt file, or a folder of them")
    parser.add_argument("--prompt", required=True, help="a file that Prompt.save wrote")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True, help="what the other program computed in")
    parser.add_argument(
        "--rules", help='a JSON object of regular expressions and taps, such as {"block_(\\\\d+)": "layers.{1}"}'
    )
    parser.add_argument("--engine", default="imported", help="the other program's name")
    parser.add_argument("--out", help="file.safetensors; without it, only what the states are is printed")
    return {"import": _import}


def _import(options: argparse.Namespace) -> int:
    from ..comparison.foreign_dumps import fitting_states, import_states, read_rules, read_states
    from ..comparison.identify import identify
    from ..models import load_model
    from ..prompt import Prompt

    model, prompt = load_model(options.model), Prompt.load(options.prompt)
    states = read_states(options.states)
    if options.out is None:
        fitting, others = fitting_states(prompt, states)
        for each in [*identify(model, prompt, fitting, dtype=options.dtype), *others]:
            print(each)
        return 0
    rules = None if options.rules is None else read_rules(options.rules)
    trace, found = import_states(model, prompt, states, dtype=options.dtype, rules=rules, engine=options.engine)
    for each in found:
        print(each)
    trace.save(options.out)
    print(f"{trace} written to {options.out}")
    return 0
