"""`python -m workbench.benchmarks [engine | batching | comparison | serving | streamed | leave-one-out | engines | cpu-engines | experts | timeline]`: timings on this machine, interleaved, as medians."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path


def main() -> None:
    """Parse the command line and run the chosen benchmark, which prints its results."""
    parser = argparse.ArgumentParser(prog="python -m workbench.benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "benchmark", nargs="?", default="engine", choices=("engine", "batching", "comparison", "serving", "streamed", "leave-one-out", "engines", "cpu-engines", "experts", "timeline"),
        help="engine: one request compared with Transformers; batching: many requests at once; comparison: traces, recording and lint; "
        "serving: several engines on spliced prompts; streamed: a verdict on a large model; leave-one-out: what each optimisation brings on a GPU; engines: the verdict on every engine that is installed; cpu-engines: speed of the engines that are installed, on this CPU; experts: a mixture of experts compared with Transformers; timeline: the kernels of one decode step on a GPU",
    )  # fmt: skip
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", default=["transformers", "numba"], help="for serving")
    parser.add_argument("--dtype", default="bfloat16", help="for serving, streamed and cpu-engines")
    parser.add_argument("--device", default="cpu", help="for serving and streamed")
    parser.add_argument("--shape", default="1B", help="for streamed: 1B, 3B, 8B or 24B")
    parser.add_argument("--tokens", type=int, default=64, help="for streamed: length of the prompt")
    parser.add_argument(
        "--json", help="for cpu-engines: name of the file in data/bench; for experts and timeline: a file to write"
    )
    parser.add_argument("--batch", type=int, default=16, help="for timeline: requests at once")
    parser.add_argument("--folder", help="for streamed: where its checkpoint is written")
    options = parser.parse_args()
    files = {
        "streamed": "streamed_reference",
        "leave-one-out": "leave_one_out",
        "engines": ".comparison.side_by_side",
        "cpu-engines": "cpu_engines",
    }
    module = import_module(f".{files.get(options.benchmark, options.benchmark)}", __package__)
    if options.benchmark == "streamed":
        module.run(options.shape, options.dtype, options.device, options.tokens, options.folder)
    elif options.benchmark == "engines":
        module.run(options.model, Path("data/bench/engines.json"))
    elif options.benchmark == "cpu-engines":
        name = f"cpu-{options.dtype}.json" if options.json is None else options.json
        module.run(options.model, options.dtype, options.rounds, Path("data/bench") / name)
    elif options.benchmark == "experts":
        module.run(options.dtype, options.device, options.rounds, options.json and Path(options.json))
    elif options.benchmark == "timeline":
        module.run(options.model, options.dtype, options.batch, options.json and Path(options.json))
    elif options.benchmark == "serving":
        module.run(options.engines, options.model, options.dtype, options.device, options.rounds)
    else:
        module.run(options.model, options.rounds)


if __name__ == "__main__":
    main()
