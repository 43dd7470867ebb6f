"""Models on disk: find them, and read their configuration, tokenizer and checkpoint."""

from .model import Model, load_model

__all__ = ["Model", "load_model"]
