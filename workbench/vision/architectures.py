"""How each architecture represents images: what its tower returns, and which prompt tokens stand for an image.

Layouts follow the processors of Transformers 5 (`replace_image_token` there); `tests/vision/test_prompt_builder.py` compares them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..errors import ModelError
from ..models.model import placeholder_id
from ..prompt import Span


@dataclass(frozen=True)
class Features:
    """The features that a tower computes for one image or sound.

    Attributes:
        rows: `[rows, hidden]`, as they enter the language model.
        grid: patch grid of the rows, (lines, columns), or (time, height, width) for M-RoPE models; None if they form no
            grid.
        deepstack: `[levels, rows, hidden]`; level l is added to the hidden states after decoder layer l (Qwen3-VL).
            None for others.
        tiles: number of (lines, columns) of tiles that the image was cut into (Idefics 3); (0, 0) if it was not cut.
    """

    rows: torch.Tensor
    grid: tuple[int, ...] | None = None
    deepstack: torch.Tensor | None = None
    tiles: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Family:
    """How an architecture lays out images; this class: LLaVA and similar, with one placeholder token per row.

    Subclasses override the methods in which their architecture differs. An item is one image or sound.

    Attributes:
        config: the whole model's configuration.
        marker: the text that the chat template writes for an item.
        token: the placeholder token, one per row.
        modality: "image" or "audio".
        attention: how the tokens of an item attend to each other.
    """

    config: Any
    marker: str
    token: str
    modality: str = "image"
    attention: Literal["causal", "bidirectional"] = "causal"

    # Options of the image processor; whether it takes the images nested, one list per prompt; and whether an image's
    # features depend on the other images of its prompt.
    reader_options: ClassVar[dict[str, Any]] = {}
    nested: ClassVar[bool] = False
    depends_on_other_images: ClassVar[bool] = False

    def run(self, network: Any, processed: dict[str, Any]) -> Any:
        """Run the processor's output through tower and projector; return Transformers' output object."""
        return run_tower(network, self.modality, processed)

    def split(self, output: Any, processed: dict[str, Any], count: int) -> list[Features]:
        """Split the output of `run` into the features of `count` items.

        Raises:
            ModelError: the tower returned another number of images.
        """
        pooled = output.pooler_output
        if len(pooled) != count:
            raise ModelError(f"{count} images went into the tower and {len(pooled)} came out")
        rows = [each.reshape(-1, each.shape[-1]) for each in pooled]
        return [Features(each, _square(len(each))) for each in rows]

    def outline(self, processed: dict[str, Any], count: int) -> list[Features] | None:
        """Return features that have shapes but no values (rows on the meta device), from the processor's output alone.

        None if the number of rows is only known once the tower has run.
        """
        height, width = processed["pixel_values"].shape[-2:]
        patch = self.config.vision_config.patch_size
        kind = self.config.vision_config.model_type
        # CLIP has a class token before its patches, SigLIP has none; "default" drops the first row, whatever it is.
        extra = int("clip" in kind and "siglip" not in kind)
        extra -= getattr(self.config, "vision_feature_select_strategy", "full") == "default"
        return [self._blank((height // patch) * (width // patch) + extra)] * count

    def _blank(self, rows: int, grid: tuple[int, ...] | None = None, tiles: tuple[int, int] = (0, 0)) -> Features:
        hidden = self.config.get_text_config().hidden_size
        return Features(torch.empty((rows, hidden), device="meta"), grid or _square(rows), None, tiles)

    def text(self, features: Features) -> str:
        """Return the text that replaces an item's marker: its placeholders and the tokens around them."""
        return self.token * len(features.rows)

    def arrange(self, text: str) -> str:
        """Return the final text of the whole prompt, given the text in which the markers have been replaced."""
        return text

    def spans(self, features: Features, label: str) -> list[tuple[int, Span]]:
        """Return row count and span of each placeholder range of an item, in prompt order; `label` names the item."""
        return [(len(features.rows), Span(self.modality, features.grid, self.attention, label))]

    def token_types(self, places: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the token-type inputs of Transformers' whole model; `places` int32 `[1, seq]` is 1 at placeholders."""
        return {}

    def position_ids(self, length: int, ranges: Sequence[tuple[int, int]], spans: Sequence[Span]) -> Any:
        """Return the position ids of the prompt's `length` tokens; None if they are 0, 1, 2, ..."""
        return None

    def whole_prompt(self, spans: Sequence[Span], length: int) -> list[Span]:
        """Adjust spans that depend on the whole prompt's length (PaliGemma: all tokens attend bidirectionally); return the final ones."""
        return list(spans)


class QwenVL(Family):
    """Qwen2-VL, 2.5-VL and 3-VL: images of any size, M-RoPE positions, and in 3-VL features for the first layers."""

    def split(self, output: Any, processed: dict[str, Any], count: int) -> list[Features]:
        merge = self.config.vision_config.spatial_merge_size
        deep = getattr(output, "deepstack_features", None)
        features = []
        for item, rows in enumerate(output.pooler_output):
            time, height, width = (int(size) for size in processed["image_grid_thw"][item])
            levels = torch.stack([level[item] for level in deep]) if deep else None
            features.append(Features(rows, (time, height // merge, width // merge), levels))
        return features

    def outline(self, processed: dict[str, Any], count: int) -> list[Features]:
        merge = self.config.vision_config.spatial_merge_size
        grids = [
            (time, height // merge, width // merge) for time, height, width in processed["image_grid_thw"].tolist()
        ]
        return [self._blank(time * height * width, (time, height, width)) for time, height, width in grids]

    def token_types(self, places: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": places}  # 1 for tokens with image positions

    def position_ids(self, length: int, ranges: Sequence[tuple[int, int]], spans: Sequence[Span]) -> torch.Tensor:
        """M-RoPE (Wang et al. 2024, arXiv:2409.12191): text counts on all three axes, an image's rows on its own grid.

        Returns:
            int64 `[3, length]`: time, height, width. Tokens after an image continue after its largest position.
        """
        positions = torch.empty((3, length), dtype=torch.int64)
        done, next_position = 0, 0
        for (start, stop), span in zip(ranges, spans, strict=True):
            positions[:, done:start] = torch.arange(start - done) + next_position
            next_position += start - done
            time, height, width = span.grid or (1, 1, stop - start)
            axes = torch.meshgrid(*(torch.arange(size) for size in (time, height, width)), indexing="ij")
            positions[:, start:stop] = torch.stack([axis.flatten() for axis in axes]) + next_position
            next_position += max(time, height, width)
            done = stop
        positions[:, done:] = torch.arange(length - done) + next_position
        return positions


class InternVL(Family):
    """InternVL: an image is one to a dozen tiles of equally many rows, all between one `<img>` and `</img>`."""

    def split(self, output: Any, processed: dict[str, Any], count: int) -> list[Features]:
        tiles = [int(number) for number in processed.get("num_patches", [1] * count)]
        parts = output.pooler_output.split(tiles)
        return [
            Features(part.reshape(-1, part.shape[-1]), _square(len(part[0])) if len(part) == 1 else None)
            for part in parts
        ]

    def outline(self, processed: dict[str, Any], count: int) -> list[Features]:
        height, width = processed["pixel_values"].shape[-2:]
        patch, ratio = self.config.vision_config.patch_size[0], self.config.downsample_ratio
        each = int(height // patch * ratio) * int(width // patch * ratio)
        return [self._blank(each * int(tiles)) for tiles in processed.get("num_patches", [1] * count)]

    def text(self, features: Features) -> str:
        return f"<img>{self.token * len(features.rows)}</img>"


class Gemma3(Family):
    """Gemma 3: 256 rows per image, which attend to each other bidirectionally; empty lines surround an image."""

    def outline(self, processed: dict[str, Any], count: int) -> list[Features]:
        return [self._blank(self.config.mm_tokens_per_image)] * count

    def token_types(self, places: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"token_type_ids": places}  # 1 for tokens that attend bidirectionally

    def text(self, features: Features) -> str:
        return f"\n\n<start_of_image>{self.token * len(features.rows)}<end_of_image>\n\n"


class PaliGemma(Family):
    """PaliGemma: images, `<bos>`, question, line feed; all of it attends bidirectionally; positions start at 1."""

    def token_types(self, places: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"token_type_ids": torch.zeros_like(places)}  # the whole prompt is prefix

    def arrange(self, text: str) -> str:
        end = text.rfind(self.token) + len(self.token) if self.token in text else 0
        return f"{text[:end]}<bos>{text[end:]}\n"

    def whole_prompt(self, spans: Sequence[Span], length: int) -> list[Span]:
        return [Span(span.modality, span.grid, "bidirectional", span.label, block=(0, length)) for span in spans]

    def position_ids(self, length: int, ranges: Sequence[tuple[int, int]], spans: Sequence[Span]) -> torch.Tensor:
        return torch.arange(1, length + 1)


class Idefics3(Family):
    """Idefics 3 and SmolVLM: a large image is cut into tiles, each with its own placeholder range; the whole image comes last."""

    reader_options: ClassVar[dict[str, Any]] = {"return_row_col_info": True}
    nested: ClassVar[bool] = True

    def split(self, output: Any, processed: dict[str, Any], count: int) -> list[Features]:
        rows, columns = (processed.get(name, [[0] * count])[0] for name in ("rows", "cols"))
        tiles = [int(row) * int(column) + 1 for row, column in zip(rows, columns, strict=True)]
        every = torch.cat([part.reshape(-1, part.shape[-1]) for part in output.pooler_output])
        each = len(every) // sum(tiles)
        parts = every.split([number * each for number in tiles])
        return [
            Features(part, _square(each), None, (int(row), int(column)))
            for part, row, column in zip(parts, rows, columns, strict=True)
        ]

    def outline(self, processed: dict[str, Any], count: int) -> list[Features]:
        side = processed["pixel_values"].shape[-1] // self.config.vision_config.patch_size // self.config.scale_factor
        cuts = [
            tuple(int(number[0][item]) for number in (processed["rows"], processed["cols"])) for item in range(count)
        ]
        return [
            self._blank(side * side * (rows * columns + 1), (side, side), (rows, columns)) for rows, columns in cuts
        ]

    def text(self, features: Features) -> str:
        rows, columns = features.tiles
        run = self.token * (len(features.rows) // (rows * columns + 1))
        fence = "<fake_token_around_image>"
        cut = "".join(
            "".join(f"{fence}<row_{row + 1}_col_{column + 1}>{run}" for column in range(columns)) + "\n"
            for row in range(rows)
        )
        return f"{cut}{chr(10) if cut else ''}{fence}<global-img>{run}{fence}"

    def spans(self, features: Features, label: str) -> list[tuple[int, Span]]:
        rows, columns = features.tiles
        each = len(features.rows) // (rows * columns + 1)
        names = [f"{label}, tile {row + 1}.{column + 1}" for row in range(rows) for column in range(columns)]
        whole = f"{label}, whole" if names else label
        return [(each, Span(self.modality, features.grid, self.attention, name)) for name in [*names, whole]]


class LlavaOnevision(Family):
    """LLaVA-OneVision: the row count of an image depends on its shape by rules that only the model's own code implements; an image
    is cut into tiles only if it is the only one in its prompt."""

    nested: ClassVar[bool] = True
    depends_on_other_images: ClassVar[bool] = True

    def outline(self, processed: dict[str, Any], count: int) -> None:
        return None


class Qwen2Audio(Family):
    """Qwen2-Audio: a sound has one placeholder per 40 ms; the encoder gets a mask of the padding after its end."""

    def run(self, network: Any, processed: dict[str, Any]) -> list[torch.Tensor]:
        whole = network.model
        features, mask = processed["input_features"], processed["feature_attention_mask"]
        frames, rows = whole.audio_tower._get_feat_extract_output_lengths(mask.sum(-1))
        padding = torch.arange((features.shape[-1] - 2) // 2 + 1, device=mask.device) >= frames[:, None]
        hidden = torch.zeros(padding.shape, dtype=features.dtype, device=mask.device)
        hidden = hidden.masked_fill(padding, torch.finfo(features.dtype).min)[:, None, None, :]
        hidden = hidden.expand(-1, 1, padding.shape[1], -1)
        states = whole.multi_modal_projector(whole.audio_tower(features, attention_mask=hidden).last_hidden_state)
        return [state[:count] for state, count in zip(states, rows.tolist(), strict=True)]

    def outline(self, processed: dict[str, Any], count: int) -> list[Features]:
        lengths = processed["feature_attention_mask"].sum(-1).tolist()
        return [self._blank(((length - 1) // 2 - 1) // 2 + 1) for length in lengths]

    def split(self, output: list[torch.Tensor], processed: dict[str, Any], count: int) -> list[Features]:
        return [Features(rows) for rows in output]


@dataclass(frozen=True)
class _Kind:
    """An entry of the table of families."""

    family: type[Family]
    marker: str | None = None
    attention: Literal["causal", "bidirectional"] = "causal"
    modality: str = "image"


_KINDS = {
    "llava": _Kind(Family),
    "llava_onevision": _Kind(LlavaOnevision),
    "qwen2_vl": _Kind(QwenVL),
    "qwen2_5_vl": _Kind(QwenVL),
    "qwen3_vl": _Kind(QwenVL),
    "internvl": _Kind(InternVL),
    "gemma3": _Kind(Gemma3, "<start_of_image>", "bidirectional"),
    "paligemma": _Kind(PaliGemma, attention="bidirectional"),
    "idefics3": _Kind(Idefics3),
    "smolvlm": _Kind(Idefics3),
    "qwen2_audio": _Kind(Qwen2Audio, modality="audio"),
}
SUPPORTED = tuple(_KINDS)


def is_known(config: Any) -> bool:
    """Whether the layout of a model is in the table here; other models' own processors lay out their prompts (`class_prompt.py`).

    Pixtral is published as a LLaVA with another tower, whose images are lines of rows with tokens between them.
    """
    vision = getattr(getattr(config, "vision_config", None), "model_type", "")
    return config.model_type in _KINDS and vision != "pixtral"


def image_attention(config: Any) -> Literal["causal", "bidirectional"]:
    """Return how the tokens of an image attend to each other, by the table or by the model's own setting (Gemma 4); else "causal"."""
    kind = _KINDS.get(config.model_type)
    if kind is not None:
        return kind.attention
    own = getattr(config.get_text_config(), "use_bidirectional_attention", None)
    return "bidirectional" if own in ("vision", "all", True) or config.model_type == "molmo2" else "causal"


def family_of(config: Any, tokenizer: Any) -> Family:
    """Return the family of a model: how its architecture lays out images and audio in a prompt.

    Args:
        config: Transformers' configuration of the whole model.
        tokenizer: the model's, for the text of its placeholder token.

    Raises:
        ModelError: an architecture that is not in `SUPPORTED`, or a configuration that names no placeholder token.
    """
    kind = _KINDS.get(config.model_type)
    if kind is None:
        raise ModelError(
            f"how {config.model_type!r} lays out images is not known here; known are {', '.join(SUPPORTED)}. Compute its "
            "features with load_vision_tower or by other means and give Prompt the ranges yourself"
        )
    placeholder = placeholder_id(config)
    if placeholder is None:
        raise ModelError(
            f"the configuration of {config.model_type!r} names no placeholder token (image_token_id or similar): add it to "
            "config.json"
        )
    token = tokenizer.convert_ids_to_tokens(placeholder)
    return kind.family(config, kind.marker or token, token, kind.modality, kind.attention)


def _square(rows: int) -> tuple[int, int] | None:
    side = round(rows**0.5)
    return (side, side) if side * side == rows else None


_FUNCTIONS = ("get_{}_features", "extract_feature", "encode_images", "get_vision_features")


def run_tower(network: Any, modality: str, processed: dict[str, Any]) -> Any:
    """Call the network's method that computes features: `get_<modality>_features`, or a name that remote code uses.

    Only those entries of `processed` are passed that the method has parameters for.

    Raises:
        ModelError: the network has none of the known methods.
    """
    names = [name.format(modality) for name in _FUNCTIONS]
    holders = [holder for holder in (network, getattr(network, "model", None)) if holder is not None]
    function = next((getattr(holder, name) for holder in holders for name in names if hasattr(holder, name)), None)
    if function is None:
        raise ModelError(
            f"{type(network).__name__} has none of {', '.join(names)}: the method that computes its features is not known here"
        )
    taken = inspect.signature(function).parameters
    return function(**{name: value for name, value in processed.items() if name in taken and value is not None})
