"""Timings of the kernels; nothing else imports this package."""
