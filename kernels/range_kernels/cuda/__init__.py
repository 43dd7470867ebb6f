"""Numba-CUDA kernels. Those made of plain Numba also run in the CUDA simulator (`NUMBA_ENABLE_CUDASIM=1`)."""
