"""Time several jobs interleaved, so that only their ratios within one run are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


def time_interleaved(jobs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each job.

    A round runs every job once; two more rounds at the start are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for round_number in range(rounds + 2):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if round_number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}
