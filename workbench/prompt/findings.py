"""A finding: one problem of a prompt, described so that a person can act on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """What is wrong (`message` gives the numbers and the fix), how severe it is, and where.

    Attributes:
        code: a stable name to filter by, such as `range-overlap`.
        severity: "error" (our engines refuse the prompt), "warning" (it runs, but the answer is suspect), "info".
        item: index of the item or range that the finding is about, or None.
    """

    code: str
    severity: Severity
    message: str
    item: int | None = None

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} [{self.code}]"
