"""This project's own engine: continuous batching over a paged KV cache, with splice and attention from `range_kernels`."""
