"""What is wrong with a prompt, and what an engine would make of it."""

from .lint import effective_prompt, lint

__all__ = ["effective_prompt", "lint"]
