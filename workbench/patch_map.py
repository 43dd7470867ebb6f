"""Which patch of which picture is which token, and what a moved range covers and bares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from .prompt import Prompt
from .ranges import shift


@dataclass(frozen=True)
class PatchMap:
    """Pictures in a prompt whose ranges may be moved.

    Attributes:
        pictures: as the tower saw them, one an item.
        prompt: as built, its ranges where they belong.
        tokens: the prompt's ids as text.
        shift: by how many tokens the ranges are moved.
        chosen: item and row to mark, or None.
    """

    pictures: Sequence[Image.Image]
    prompt: Prompt
    tokens: Sequence[str]
    shift: int = 0
    chosen: tuple[int, int] | None = None

    @property
    def moved(self) -> list[tuple[int, int]]:
        """The ranges after the move."""
        return shift(self.prompt.embedding_ranges, self.shift)

    def kinds(self) -> list[str]:
        """What each token is: "text", "row" (an item's row over a placeholder), "lost" (a row over text), "bare" (a placeholder)."""
        home = {p for start, stop in self.prompt.embedding_ranges for p in range(start, stop)}
        covered = {p for start, stop in self.moved for p in range(start, stop)}
        names = {(False, False): "text", (True, True): "row", (False, True): "lost", (True, False): "bare"}
        return [names[position in home, position in covered] for position in range(len(self.prompt))]


def patch_of(row: int, grid: tuple[int, ...]) -> tuple[int, int]:
    """Row and column of the patch that an item's row comes from; rows run through the grid line by line.

    >>> patch_of(9, (7, 7))
    (1, 2)
    """
    return row // grid[-1] % grid[-2], row % grid[-1]
