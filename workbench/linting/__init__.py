"""Lint prompts: what is wrong with a prompt, and what an engine would compute from it."""

from .lint import effective_prompt, lint

__all__ = ["effective_prompt", "lint"]
