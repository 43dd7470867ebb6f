"""Silence Transformers' progress bars and warnings, for loads that are short or whose result is checked here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced_transformers(reports: bool = True) -> Iterator[None]:
    """Suppress Transformers' progress bars inside the `with` block; with `reports=False` also its warnings."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not reports:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
