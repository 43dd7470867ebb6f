"""Prompts with injected embeddings, and the checks on them that need no model."""

from .findings import Finding
from .prompt import MultimodalPrompt, Prompt, Span
from .ranges import Range

__all__ = ["Finding", "MultimodalPrompt", "Prompt", "Range", "Span"]
