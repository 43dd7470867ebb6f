"""What rows of a prompt are replaced by, to see what an answer takes from them: a baseline row, or the image with a part covered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageFilter

from ..engines.base import Engine
from ..errors import PromptError
from ..models.model import placeholder_id
from ..prompt import Prompt
from ..vision.images import ImageLike, open_image
from ..vision.tower import VisionTower

Part = tuple[int, tuple[int, ...]]
"""An item's number, and some of its rows."""
ROW_BASELINES = ("mean", "placeholder")
COVERS = ("mean", "blur")


class Replacement(Protocol):
    """Makes variants of a prompt in which some rows are replaced; `name` says by what."""

    name: str

    def variants(self, parts: Sequence[Part]) -> list[Prompt]:
        """One prompt per part, without that part."""

    def others(self, part: Part, count: int, generator: torch.Generator) -> list[Prompt]:
        """`count` prompts in which this part is replaced by other things, chosen at random."""


class ReplacedRows:
    """Rows are replaced by rows of a baseline; deepstack features of the same rows by the item's mean features.

    Raises:
        PromptError: a baseline that does not fit or is not finite.
    """

    def __init__(self, engine: Engine, prompt: Prompt, baseline: str | torch.Tensor | Sequence[torch.Tensor]) -> None:
        self.prompt = prompt
        if isinstance(baseline, str):
            self.name = f"the {baseline} row"
            self._rows = self._named(engine, baseline)
        else:
            self.name = "given rows"
            self._rows = self._given(baseline)

    def _named(self, engine: Engine, baseline: str) -> list[torch.Tensor]:
        items = self.prompt.input_embeddings
        if baseline == "mean":
            return [item.float().mean(dim=0, keepdim=True).expand(len(item), -1) for item in items]
        if baseline != "placeholder":
            raise PromptError(
                f"baseline={baseline!r}: use one of {', '.join(ROW_BASELINES)}, a row, or rows for each item"
            )
        token = placeholder_id(engine.model.config)
        ids = [self.prompt.input_ids[start] if token is None else token for start, _ in self.prompt.embedding_ranges]
        return [row.expand(len(item), -1) for row, item in zip(engine.model.token_rows(ids), items, strict=True)]

    def _given(self, baseline: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
        items = self.prompt.input_embeddings
        one = isinstance(baseline, torch.Tensor) and baseline.ndim == 1
        given: list[Any] = [baseline] * len(items) if one else list(baseline)
        if not all(isinstance(each, torch.Tensor) for each in given):
            raise PromptError("baseline must be tensors: one row [hidden], or [rows, hidden] for each item")
        wanted = [tuple(item.shape) for item in items]
        shapes = [tuple(each.shape) for each in given]
        if len(given) != len(items) or any(
            shape not in (full, full[-1:]) for shape, full in zip(shapes, wanted, strict=True)
        ):
            raise PromptError(
                f"baseline has shapes {shapes}: one row [{wanted[0][-1]}], or for the items {wanted}, is needed"
            )
        for number, each in enumerate(given):
            if not torch.isfinite(each).all():
                raise PromptError(f"the baseline of item {number} is not finite: remove NaN and infinity from it")
        return [each.float().expand(item.shape) for each, item in zip(given, items, strict=True)]

    def variants(self, parts: Sequence[Part]) -> list[Prompt]:
        return [self._without(item, rows, self._rows[item][list(rows)]) for item, rows in parts]

    def others(self, part: Part, count: int, generator: torch.Generator) -> list[Prompt]:
        item, rows = part
        own = self.prompt.input_embeddings[item].float()
        chosen = torch.randint(len(own), (count, len(rows)), generator=generator)
        return [self._without(item, rows, own[each]) for each in chosen]

    def _without(self, number: int, rows: Sequence[int], replacement: torch.Tensor) -> Prompt:
        items = list(self.prompt.input_embeddings)
        items[number] = items[number].clone()
        items[number][list(rows)] = replacement.to(items[number])
        if not self.prompt.deepstack:
            return self.prompt.replace(input_embeddings=items)
        levels = list(self.prompt.deepstack)
        levels[number] = levels[number].clone()
        levels[number][:, list(rows)] = levels[number].mean(dim=1, keepdim=True)
        return self.prompt.replace(input_embeddings=items, deepstack=levels)


class CoveredImages:
    """Parts of the images are covered, and the tower runs again: all rows of the image change, as they do for another picture.

    A row's part of the image is its cell in a grid of equal cells.

    Raises:
        PromptError: images that are not those of the prompt, items whose rows form no grid, a processor that crops the image, or an
            unknown cover.
    """

    def __init__(self, prompt: Prompt, images: Sequence[ImageLike], tower: VisionTower, cover: str) -> None:
        if cover not in COVERS:
            raise PromptError(f"baseline={cover!r}: images are covered with their {' or '.join(COVERS)}")
        self.prompt, self.tower, self.name = (
            prompt,
            tower,
            f"the image's {'blur' if cover == 'blur' else 'mean colour'}",
        )
        self.images = [open_image(image) for image in images]
        if len(self.images) != len(prompt.input_embeddings):
            raise PromptError(f"{len(self.images)} images for {len(prompt.input_embeddings)} items: give one per item")
        self.grids = [self._grid(number) for number in range(len(self.images))]
        if any(image.width != image.height for image in self.images) and _crops(tower.processor):
            raise PromptError(
                "this model's processor crops images that are not square, so a row's part of the image is not known: crop them first"
            )
        self._covers = [self._cover(image, cover) for image in self.images]
        self._check_rows()

    def _grid(self, number: int) -> tuple[int, int]:
        grid = self.prompt.spans[number].grid if self.prompt.spans else None
        rows = len(self.prompt.input_embeddings[number])
        if grid is None or len(grid) < 2 or int(np.prod(grid)) != rows or int(np.prod(grid[:-2])) != 1:
            raise PromptError(
                f"the {rows} rows of item {number} form no grid over its image (span.grid is {grid}): leave images out, to replace rows"
            )
        return grid[-2], grid[-1]

    def _check_rows(self) -> None:
        for number, (found, item) in enumerate(
            zip(self.tower.features(self.images), self.prompt.input_embeddings, strict=True)
        ):
            given = item.float()
            if found.rows.shape != item.shape or (found.rows.float() - given).norm() > 0.02 * given.norm():
                raise PromptError(
                    f"images[{number}] does not give the rows of item {number}: pass the images that the prompt was built from"
                )

    @staticmethod
    def _cover(image: Image.Image, cover: str) -> Image.Image:
        if cover == "blur":
            return image.filter(ImageFilter.GaussianBlur(max(image.size) / 6))
        mean = np.asarray(image).reshape(-1, 3).mean(axis=0)
        return Image.new("RGB", image.size, tuple(int(shade) for shade in mean.round()))

    def variants(self, parts: Sequence[Part]) -> list[Prompt]:
        return self._prompts(parts, [self._covers[item] for item, _ in parts])

    def others(self, part: Part, count: int, generator: torch.Generator) -> list[Prompt]:
        """Covers of a colour that occurs in the image."""
        image = self.images[part[0]]
        pixels = np.asarray(image).reshape(-1, 3)
        chosen = torch.randint(len(pixels), (count,), generator=generator).tolist()
        colours = [Image.new("RGB", image.size, tuple(int(shade) for shade in pixels[each])) for each in chosen]
        return self._prompts([part] * count, colours)

    def _prompts(self, parts: Sequence[Part], covers: Sequence[Image.Image]) -> list[Prompt]:
        covered = [self._covered(item, rows, cover) for (item, rows), cover in zip(parts, covers, strict=True)]
        prompts = []
        for (item, _), features in zip(parts, self.tower.features(covered), strict=True):
            items, levels = list(self.prompt.input_embeddings), list(self.prompt.deepstack)
            items[item] = features.rows.to(items[item])
            if levels and features.deepstack is not None:
                levels[item] = features.deepstack.to(levels[item])
            prompts.append(self.prompt.replace(input_embeddings=items, deepstack=levels))
        return prompts

    def _covered(self, number: int, rows: Sequence[int], cover: Image.Image) -> Image.Image:
        image = self.images[number].copy()
        lines, columns = self.grids[number]
        for row in rows:
            line, column = divmod(row, columns)
            left, right = (round(edge * image.width / columns) for edge in (column, column + 1))
            top, bottom = (round(edge * image.height / lines) for edge in (line, line + 1))
            image.paste(cover.crop((left, top, right, bottom)), (left, top))
        return image


def _crops(processor: Any) -> bool:
    settings = getattr(processor, "settings", None)
    return '"do_center_crop": true' in str(settings).replace("'", '"').replace("True", "true")
