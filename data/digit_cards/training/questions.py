"""The questions that digit-cards can be asked about a scene, and their right answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data.digit_cards.training.cards import Scene, draw_scene

NUMBERS = ("one", "two", "three")


@dataclass(frozen=True)
class Question:
    """A kind of question: its text, the scenes it is asked about, and how it is answered.

    Attributes:
        images: minimum and maximum number of images.
        cards: minimum and maximum number of cards per image.
        answer: function from scenes to the right answer, in the words the model is trained to use.
    """

    text: str
    images: tuple[int, int]
    cards: tuple[int, int]
    answer: Callable[[Sequence[Scene]], str]

    def sizes(self, generator: np.random.Generator) -> tuple[int, int]:
        """Draw the number of images, and of cards per image."""
        images, cards = (int(generator.integers(low, high + 1)) for low, high in (self.images, self.cards))
        return images, cards

    def pose(self, generator: np.random.Generator, indices: np.ndarray) -> tuple[list[Scene], str]:
        """Draw random scenes for this question; return them and the right answer."""
        images, cards = self.sizes(generator)
        scenes = [draw_scene(generator, indices, cards) for _ in range(images)]
        return scenes, self.answer(scenes)


QUESTIONS = {
    "digit": Question("What digit is on the card?", (1, 1), (1, 1), lambda scenes: str(scenes[0].cards[0].digit)),
    "colour": Question("What colour is it?", (1, 1), (1, 1), lambda scenes: scenes[0].cards[0].colour),
    "corner": Question(
        "Which corner is the card nearest to?", (1, 1), (1, 1), lambda scenes: scenes[0].cards[0].corner
    ),
    "order": Question(
        "Read the cards in order.", (2, 3), (1, 1), lambda scenes: ", ".join(scene.cards[0].name for scene in scenes)
    ),
    "row": Question(
        "Read the cards from left to right.",
        (1, 1),
        (2, 3),
        lambda scenes: ", ".join(card.name for card in scenes[0].cards),
    ),
    "count": Question("How many cards are there?", (1, 1), (1, 3), lambda scenes: NUMBERS[len(scenes[0].cards) - 1]),
}
