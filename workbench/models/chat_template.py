"""Run chat templates, which are programs of the model's author, within a limit of time, and report their errors as the project's.

Transformers renders them in Jinja's sandbox, which lets no code out of the template but does not end endless loops.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ModelError, foreign_errors

SECONDS = 5.0


class _TooLong(Exception):
    pass


@contextmanager
def template_limits(name: str, seconds: float = SECONDS) -> Iterator[None]:
    """Stop a chat template that is rendered inside the block, in this thread, after some seconds.

    The lines of the template's compiled code are traced; nothing else is slowed down.

    Raises:
        ModelError: the template takes too long, or fails; `name` is the model's.
    """
    deadline = time.monotonic() + seconds
    before = sys.gettrace()

    def line(frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > deadline:
            raise _TooLong(f"it was stopped after {seconds:g} s")
        return line

    def call(frame: Any, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename == "<template>" else None

    with foreign_errors(ModelError, f"the chat template of {name!r} failed", "Correct it in the model's folder"):
        if before is None:  # a debugger or coverage tool keeps its own trace function
            sys.settrace(call)
        try:
            yield
        finally:
            if before is None:
                sys.settrace(None)
