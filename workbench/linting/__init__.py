"""Lint: find what is wrong with a prompt, and predict what a given version of an engine would compute from it."""

from .lint import effective_prompt, lint

__all__ = ["effective_prompt", "lint"]
