"""A finding: one thing that is wrong with a prompt, in words a person can act on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """What is wrong (`message` states the numbers and the mend), how badly, and where.

    Attributes:
        code: a stable name to filter by, such as `range-overlap`.
        severity: "error" (our engines refuse the prompt), "warning" (it runs, the answer is suspect), "info".
        item: index of the item or range it is about, or None.
    """

    code: str
    severity: Severity
    message: str
    item: int | None = None

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} [{self.code}]"
