"""llama.cpp in an environment of its own: `gguf_files.py` writes the model for it, `engine.py` is the adapter, `worker.py` runs there."""
