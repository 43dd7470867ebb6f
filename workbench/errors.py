"""The exceptions that a caller may want to catch. Every message names the item, the numbers and the fix."""

from __future__ import annotations


class PromptError(ValueError):
    """A prompt that no engine can run: empty, ids outside the vocabulary, positions of the wrong shape."""


class EmbeddingRangeError(PromptError):
    """`input_embeddings` and `embedding_ranges` that do not fit the prompt, the model or each other."""


class ModelError(RuntimeError):
    """A model that cannot be found, fetched, read or run."""


class EngineDied(ModelError):
    """An engine's process has ended; all its requests are lost."""


class TraceError(ValueError):
    """Traces that cannot be read, or cannot be compared with each other."""
