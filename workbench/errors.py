"""The exceptions that a caller may want to catch. Every message names the item, the numbers and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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


def reason(error: BaseException, limit: int = 400) -> str:
    """Return another library's error as one line for a message: its type, if the text does not explain itself, and its text, shortened."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # an exception whose __str__ fails
        text = ""
    if not isinstance(error, PromptError | ModelError | TraceError | OSError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


@contextmanager
def foreign_errors(raised: type[Exception], what: str, fix: str) -> Iterator[None]:
    """Turn every error of another library inside the block into one of the project's.

    Rust libraries (tokenizers) panic with an exception that is not an `Exception`; it is translated too.

    Args:
        raised: the class to raise.
        what: the item and what could not be done with it.
        fix: what the user can do.
    """
    try:
        yield
    except (PromptError, ModelError, TraceError):
        raise
    except Exception as error:
        raise raised(f"{what}: {reason(error)}. {fix}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # KeyboardInterrupt, SystemExit, GeneratorExit
            raise
        raise raised(f"{what}: {reason(error)}. {fix}") from error
