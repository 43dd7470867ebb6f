"""The workbench's own engine: a compact decoder over the range kernels."""
