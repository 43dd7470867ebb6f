"""vLLM in an environment of its own: `engine.py` is the adapter here, `worker.py` runs there."""
