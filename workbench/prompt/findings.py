"""A finding: one problem of a prompt, described so that a person can act on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One problem of a prompt.

    Attributes:
        code: a stable name to filter by, such as `range-overlap`.
        severity: "error" (this project's engines reject the prompt), "warning" (it runs, but the answer may be wrong), "info".
        message: what is wrong, with numbers, and the fix.
        item: index of the item (and of its range) that the finding is about, or None.
    """

    code: str
    severity: Severity
    message: str
    item: int | None = None

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} [{self.code}]"
