"""Fuzz every reader for a time: `python -m tests.fuzz --seconds 60`. Inputs that fail are kept in `tests/fuzz/corpus`."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
import warnings
from pathlib import Path

from tests.fuzz.readers import READERS, inputs

CORPUS = Path(__file__).parent / "corpus"
SLOWEST = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="per reader")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("readers", nargs="*", help=f"default: all of {', '.join(READERS)}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    seed = time.time_ns() if options.seed is None else options.seed
    failed = total = 0
    for name in options.readers or READERS:
        reader, count, bad = READERS[name], 0, 0
        end = time.monotonic() + options.seconds
        for data in inputs(reader, seed):
            if time.monotonic() > end:
                break
            began = time.monotonic()
            try:
                reader.check(data)
                assert time.monotonic() - began < SLOWEST, f"took {time.monotonic() - began:.0f} s"
            except AssertionError as error:
                bad += 1
                if bad <= 5:
                    kept = CORPUS / name / hashlib.sha256(data).hexdigest()[:16]
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    kept.write_bytes(data)
                    print(f"{name}: {error} ({kept})", file=sys.stderr)
            count += 1
        print(f"{name:12} {count:8,} inputs, {bad} wrong", flush=True)
        failed, total = failed + bad, total + count
    print(f"seed {seed}: {total:,} inputs, {failed} wrong")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
