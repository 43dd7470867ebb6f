"""Faults planted in the Numba engine or in what it is given: are they caught, and does the first divergence name the place?"""

from . import of_prompts, of_engines  # noqa: I001, F401, the table is in this order: what is given, then what is computed
from .in_company import crowded_batch, dice, placeholders_leak, stale_prefix_cache
from .mutant import MUTANTS, Mutant, as_markdown, judge, mutant_prompt, outcome

__all__ = [
    "MUTANTS",
    "Mutant",
    "as_markdown",
    "crowded_batch",
    "dice",
    "judge",
    "mutant_prompt",
    "outcome",
    "placeholders_leak",
    "stale_prefix_cache",
]
