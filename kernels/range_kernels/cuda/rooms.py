"""Two rooms of shared memory that are filled and read in turns: whose turn it is tells the room and the phase of its barriers."""

from __future__ import annotations

from numba import cuda, uint32

from .ptx_hopper import barrier_arrive, barrier_wait


@cuda.jit(device=True, inline="always")
def room_of(turn):
    """0 or 1."""
    return uint32(turn & 1)


@cuda.jit(device=True, inline="always")
def barrier_of(barriers, turn):
    """Address of a room's barrier; `barriers` is that of the first."""
    return barriers + uint32(8) * room_of(turn)


@cuda.jit(device=True, inline="always")
def wait_for(barriers, turn):
    """Until all have arrived at a turn; it may be the last whose barrier is complete or the one after, no earlier one."""
    barrier_wait(barrier_of(barriers, turn), uint32((turn >> 1) & 1))


@cuda.jit(device=True, inline="always")
def arrive_at(barriers, turn, lane):
    """A warp whose lanes are together arrives at a turn."""
    if lane == 0:
        barrier_arrive(barrier_of(barriers, turn))
