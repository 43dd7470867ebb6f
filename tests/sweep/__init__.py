"""The sweep: every causal class of the installed Transformers, as a small random checkpoint, against its own forward pass."""
