"""Images of cards, each with a coloured handwritten digit: the scenes that the digit-cards model is trained and tested on.

The handwriting is scikit-learn's bundled digits set (1,797 real digits, 8 x 8, of the UCI optical recognition set), enlarged,
tilted and inked in one of six colours. Every fifth digit by its index is held out: no training image shows one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 224  # pixels, width and height
COLOURS = {
    "red": (206, 32, 41),
    "orange": (240, 130, 10),
    "green": (24, 138, 58),
    "blue": (28, 76, 205),
    "purple": (132, 42, 168),
    "black": (26, 26, 30),
}
_HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class Card:
    """One card of a scene.

    Attributes:
        index: of the handwriting in scikit-learn's digits set.
        digit, colour: what it shows.
        centre: (x, y) in pixels from the top left.
        width: of the card in pixels; its height is 1.3 times that.
        tilt: in degrees, counter-clockwise.
    """

    index: int
    digit: int
    colour: str
    centre: tuple[float, float]
    width: float
    tilt: float

    @property
    def corner(self) -> str:
        """The corner of the image that the card's centre is nearest to."""
        x, y = self.centre
        return f"{'top' if y < SIZE / 2 else 'bottom'} {'left' if x < SIZE / 2 else 'right'}"

    @property
    def name(self) -> str:
        """The card's name, such as `red 7`."""
        return f"{self.colour} {self.digit}"


@dataclass(frozen=True)
class Scene:
    """Cards from left to right on one table, and the random seed for everything else in the image."""

    cards: tuple[Card, ...]
    seed: int


@cache
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """All digits, uint8 `[1797, 8, 8]` from 0 to 16, and their labels, `[1797]`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("drawing new cards needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    return digits.images.astype(np.uint8), digits.target


def split(held_out: bool) -> np.ndarray:
    """Indices of the handwriting for training, or of the held-out fifth."""
    indices = np.arange(len(handwriting()[1]))
    return indices[(indices % _HELD_OUT_EVERY == 0) == held_out]


def draw_scene(generator: np.random.Generator, indices: np.ndarray, cards: int = 1) -> Scene:
    """Draw a random scene of 1 to 3 cards, side by side, with handwriting from `indices`."""
    digits = handwriting()[1]
    chosen = []
    for slot_index in range(cards):
        if cards == 1:
            width = generator.uniform(70, 125)
            # Off the middle lines by 16 pixels or more, so that the nearest corner is unambiguous.
            largest = SIZE / 2 - 10 - width * 0.65
            x, y = (
                SIZE / 2 + generator.choice((-1, 1)) * generator.uniform(min(16, largest), max(18, largest))
                for _ in "xy"
            )
        else:
            slot = SIZE / cards
            width = slot * generator.uniform(0.66, 0.86)
            x = slot * (slot_index + 0.5) + generator.uniform(-0.04, 0.04) * slot
            y = SIZE / 2 + generator.uniform(-0.5, 0.5) * (SIZE - width * 1.6)
        index = int(generator.choice(indices))
        colour = str(generator.choice(list(COLOURS)))
        chosen.append(Card(index, int(digits[index]), colour, (x, y), width, generator.uniform(-14, 14)))
    return Scene(tuple(chosen), int(generator.integers(2**31)))


def render(scene: Scene) -> Image.Image:
    """Render the scene as an RGB image of 224 x 224 pixels; the same scene always gives the same image."""
    generator = np.random.default_rng(scene.seed)
    image = _table(generator)
    for card in scene.cards:
        _paste(image, _card(card, generator), card)
    pixels = np.asarray(image, dtype=np.int16) + generator.integers(-5, 6, (SIZE, SIZE, 1), dtype=np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _table(generator: np.random.Generator) -> Image.Image:
    """A table top: a muted colour with smooth changes of light."""
    colour = generator.integers(60, 190, 3)
    light = generator.normal(0, 16, (4, 4, 1)) + generator.normal(0, 4, (4, 4, 3))
    coarse = Image.fromarray((colour + light).clip(0, 255).astype(np.uint8))
    return coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _card(card: Card, generator: np.random.Generator) -> Image.Image:
    """The card alone, RGBA, before it is tilted."""
    width, height = round(card.width), round(card.width * 1.3)
    paper = tuple(int(shade) for shade in generator.integers(228, 256, 3))
    face = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    ImageDraw.Draw(face).rounded_rectangle((0, 0, width - 1, height - 1), width // 9, (*paper, 255), (90, 90, 90, 255))
    side = round(card.width * generator.uniform(0.72, 0.88))
    ink = tuple(int(np.clip(value + generator.integers(-14, 15), 0, 255)) for value in COLOURS[card.colour])
    corner = ((width - side) // 2, (height - side) // 2 + int(generator.integers(-3, 4)))
    face.paste(Image.new("RGBA", (side, side), (*ink, 255)), corner, _strokes(card.index, side, generator))
    return face


def _strokes(index: int, side: int, generator: np.random.Generator) -> Image.Image:
    """The handwriting as coverage, 0 to 255: enlarged smoothly, then sharpened like the edge of a pen stroke."""
    small = Image.fromarray((handwriting()[0][index] * 15).astype(np.uint8))
    large = small.resize((side, side), Image.Resampling.BICUBIC)
    middle = generator.uniform(70, 100)
    return large.point([round(255 * min(1.0, max(0.0, (level - middle) / 80 + 0.5))) for level in range(256)])


def _paste(image: Image.Image, face: Image.Image, card: Card) -> None:
    """Tilt the card and lay it on the table over its shadow."""
    tilted = face.rotate(card.tilt, Image.Resampling.BICUBIC, expand=True)
    x, y = round(card.centre[0] - tilted.width / 2), round(card.centre[1] - tilted.height / 2)
    shadow = tilted.getchannel("A").point([level // 3 for level in range(256)]).filter(ImageFilter.BoxBlur(2))
    image.paste((20, 20, 20), (x + 3, y + 4), shadow)
    image.paste(tilted, (x, y), tilted)
