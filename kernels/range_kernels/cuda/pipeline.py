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
    """Return the address of the mbarrier of an iteration's stage; `barriers` is that of stage 0, 8 bytes each."""
    return barriers + uint32(8) * stage_index(iteration)


@cuda.jit(device=True, inline="always")
def wait_stage(barriers, iteration):
    """Wait until the mbarrier phase of an iteration is complete.

    The phase is one bit, so `iteration` must be the one that its stage completed last or the next one.
    """
    barrier_wait(stage_barrier(barriers, iteration), uint32((iteration >> 1) & 1))


@cuda.jit(device=True, inline="always")
def arrive_stage(barriers, iteration, lane):
    """Arrive once per warp at the mbarrier of an iteration's stage. The warp's lanes must have converged."""
    if lane == 0:
        barrier_arrive(stage_barrier(barriers, iteration))
