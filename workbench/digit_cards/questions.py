"""What digit-cards can be asked about a scene, and the right answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .cards import Scene, draw_scene

NUMBERS = ("one", "two", "three")


@dataclass(frozen=True)
class Question:
    """A kind of question: its words, the scenes it is asked of, and how it is answered.

    Attributes:
        images: number of pictures, lowest and highest.
        cards: cards in each picture, lowest and highest.
    """

    text: str
    images: tuple[int, int]
    cards: tuple[int, int]

    def answer(self, scenes: Sequence[Scene]) -> str:
        """The right answer, in the words the model is trained to use."""
        first = scenes[0].cards[0]
        return {
            "digit": lambda: str(first.digit),
            "colour": lambda: first.colour,
            "corner": lambda: first.corner,
            "order": lambda: ", ".join(scene.cards[0].name for scene in scenes),
            "row": lambda: ", ".join(card.name for card in scenes[0].cards),
            "count": lambda: NUMBERS[len(scenes[0].cards) - 1],
        }[next(kind for kind, question in QUESTIONS.items() if question is self)]()

    def pose(self, generator: np.random.Generator, indices: np.ndarray) -> tuple[list[Scene], str]:
        """Random scenes for this question, and its right answer."""
        images, cards = (int(generator.integers(low, high + 1)) for low, high in (self.images, self.cards))
        scenes = [draw_scene(generator, indices, cards) for _ in range(images)]
        return scenes, self.answer(scenes)


QUESTIONS = {
    "digit": Question("What digit is on the card?", (1, 1), (1, 1)),
    "colour": Question("What colour is it?", (1, 1), (1, 1)),
    "corner": Question("Which corner is the card nearest to?", (1, 1), (1, 1)),
    "order": Question("Read the cards in order.", (2, 3), (1, 1)),
    "row": Question("Read the cards from left to right.", (1, 1), (2, 3)),
    "count": Question("How many cards are there?", (1, 1), (1, 3)),
}
