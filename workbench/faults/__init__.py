"""Fault injection: put known faults into an engine or its prompts, to show their effects and to test that they are found."""

# The order of these imports is the order of `FAULTS`: faults in the input, in the computation, in batching, and invalid prompts.
from . import prompt_faults, engine_faults, batching_faults, invalid_prompts  # noqa: I001, F401
from .faulty_engine import FaultyEngine
from .observe import Observation, observe
from .registry import FAULTS, Fault, faults_of
from .report import as_markdown, fault_prompt, find_fault, report_row

__all__ = [
    "FAULTS",
    "Fault",
    "FaultyEngine",
    "Observation",
    "as_markdown",
    "fault_prompt",
    "faults_of",
    "find_fault",
    "observe",
    "report_row",
]
