"""`python -m range_kernels.benchmarks`: every kernel compared with what a user would use instead; on the GPU if there is one."""

from __future__ import annotations

import argparse
import json

import torch


def main() -> None:
    """Run the CPU or the GPU benchmarks chosen on the command line; print the results and, with --json, write them."""
    parser = argparse.ArgumentParser(
        prog="python -m range_kernels.benchmarks", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="rounds per median; default: 9 on the CPU, 25 on a GPU")
    parser.add_argument(
        "--no-flex", action="store_true", help="GPU: leave out FlexAttention, which takes a minute to compile"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args()
    if options.device == "cpu":
        from .cpu import run

        report = run(options.rounds or 9)
    else:
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU here; leave --device out to time the CPU kernels")
        from .cuda import run as run_cuda

        report = run_cuda(options.rounds or 25, flex=not options.no_flex)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
