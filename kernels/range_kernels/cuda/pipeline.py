"""Double-buffered pipeline in shared memory: stage index and mbarrier phase, derived from the iteration number."""

from __future__ import annotations

from numba import cuda, uint32

from .ptx_sm90 import barrier_arrive, barrier_wait


@cuda.jit(device=True, inline="always")
def stage_index(iteration):
    """Return the stage of an iteration, 0 or 1."""
    return uint32(iteration & 1)


@cuda.jit(device=True, inline="always")
def stage_barrier(barriers, iteration):
    """Return the address of a stage's mbarrier; `barriers`: that of the first."""
    return barriers + uint32(8) * stage_index(iteration)


@cuda.jit(device=True, inline="always")
def wait_stage(barriers, iteration):
    """Wait until all have arrived for an iteration: its stage's last completed one or the next, as the phase is one bit."""
    barrier_wait(stage_barrier(barriers, iteration), uint32((iteration >> 1) & 1))


@cuda.jit(device=True, inline="always")
def arrive_stage(barriers, iteration, lane):
    """Arrive for an iteration, once per warp, whose lanes must have converged."""
    if lane == 0:
        barrier_arrive(stage_barrier(barriers, iteration))
