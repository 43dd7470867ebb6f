"""Numba-CUDA kernels. Those in plain Numba also run in the CUDA simulator (`NUMBA_ENABLE_CUDASIM=1`)."""
