"""A model's combined processor as Transformers loads it: chat template, tokenizer, and what turns images, videos and sounds into inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ModelError, PromptError, foreign_errors, reason
from ..models.chat_template import template_limits
from .processors import check_image_sizes, check_lengths
from .videos import Video

MODALITIES = ("image", "video", "audio")
_ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio"}


class OwnProcessor:
    """The processor of a model folder.

    Args:
        folder: a local folder with the model's configuration files.
        config: the whole model's configuration.
        trusted: whether Python code that comes with the model may run.

    Raises:
        ModelError: it is missing or damaged, or needs a package that is not installed.
    """

    def __init__(self, folder: Path, config: Any, trusted: bool) -> None:
        from transformers import AutoProcessor

        self.model_type, self.folder = config.model_type, folder
        try:
            self.own = AutoProcessor.from_pretrained(folder, trust_remote_code=trusted)
        except ImportError as error:
            raise ModelError(
                f"the processor of {config.model_type!r} needs a package that is not installed: {reason(error)}"
            ) from error
        except Exception as error:
            raise ModelError(
                f"the processor in {folder} cannot be read: {reason(error)}. Fetch its files again"
            ) from error
        if not any((folder / name).exists() for name in ("processor_config.json", "chat_template.json")):
            self.own = _processor_of_images(self.own, config)
        for part in ("image_processor", "video_processor"):
            check_image_sizes(getattr(self.own, part, None), folder)
        if getattr(self.own, "tokenizer", None) is None:
            raise ModelError(
                f"{folder} has no processor for {config.model_type!r} with a tokenizer: fetch its files again"
            )

    @property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer."""
        return self.own.tokenizer

    @cached_property
    def markers(self) -> dict[str, str]:
        """`{modality: the text that stands for one image, video or sound before the processor expands it}`.

        Raises:
            ModelError: it names none.
        """
        # Where the text has another token than the one it is expanded to, the processor names both.
        found = {
            each: getattr(self.own, f"{each}_placeholder_token", None) or getattr(self.own, f"{each}_token", None)
            for each in MODALITIES
        }
        named = {modality: str(token) for modality, token in found.items() if token is not None}
        if not named:
            raise ModelError(
                f"the processor of {self.model_type!r} has no token that stands for an image, video or sound: rows "
                "cannot be injected"
            )
        return named

    @property
    def chat_template(self) -> Any:
        """The chat template; None if the model has none."""
        return getattr(self.own, "chat_template", None) or self.tokenizer.chat_template

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings that determine how inputs are preprocessed, as plain JSON values, for cache keys."""
        return json.loads(json.dumps(self.own.to_dict(), default=str, sort_keys=True))

    @property
    def sampling_rate(self) -> int:
        """Samples per second of the sounds that the model takes."""
        return int(self._ear.sampling_rate)

    @property
    def _ear(self) -> Any:
        """The part that turns sounds into inputs."""
        return getattr(self.own, "audio_processor", None) or self.own.feature_extractor

    def sampled_frames(self, total: int, fps: float, height: int, width: int) -> Sequence[int]:
        """The indices of the frames that the model's processor takes of a video."""
        from transformers.video_utils import VideoMetadata

        reader = self.own.video_processor
        if not getattr(reader, "do_sample_frames", False):
            return range(total)
        metadata = VideoMetadata(total, fps=fps, width=width, height=height, duration=total / fps)
        with foreign_errors(
            PromptError, f"{self.model_type}'s processor samples no frames of {total}", "Try a longer video"
        ):
            return list(reader.sample_frames(metadata))

    def replacements(self, processed: Mapping[str, Any]) -> list[str]:
        """The texts that took the place of the markers of a prompt, in order; empty if the processor does not tell."""
        offsets = processed.get("text_replacement_offsets")
        return [each["replacement"] for each in offsets[0]] if offsets else []

    def text(self, messages: list[dict[str, Any]]) -> str:
        """Return the chat as text with a marker per item; without a chat template the parts one after another.

        Raises:
            ModelError: the template fails.
        """
        template = self.chat_template
        if template is None:
            parts = [part for message in messages for part in message["content"]]
            return "".join(part["text"] if part["type"] == "text" else self.markers[part["type"]] for part in parts)
        with template_limits(self.model_type):
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=template, add_generation_prompt=True, tokenize=False
                )
            )

    def text_of(self, modalities: Sequence[str]) -> str:
        """A text of nothing but one item of each of these modalities, with the tokens that the chat template writes around them."""
        if self.chat_template is None:
            return "\n".join(self.markers[each] for each in modalities)
        return self.text([{"role": "user", "content": [{"type": each} for each in modalities]}])

    def process(self, text: str, items: Mapping[str, Sequence[Any]], **options: Any) -> dict[str, Any]:
        """Return the model's inputs as tensors: `input_ids` `[1, seq]`, pixels and others.

        Args:
            items: by modality, in the order of their markers in `text`.
            options: passed to the processor.

        Raises:
            PromptError: the processor rejects the items, or makes more than one prompt.
            AudioError: a sound is longer than the model takes.
        """
        given: dict[str, Any] = {_ARGUMENTS[modality]: list(each) for modality, each in items.items() if each}
        if videos := items.get("video"):
            given |= self._video_options(videos)
        if items.get("audio"):
            check_lengths(self._ear, items["audio"], self.model_type)
            given["sampling_rate"] = self.sampling_rate
        # Some processors leave out what their model needs, unless asked.
        if "mm_token_type_ids" in (getattr(self.own, "model_input_names", None) or ()):
            options = {"return_mm_token_type_ids": True, **options}
        with foreign_errors(
            PromptError, f"{self.model_type}'s processor rejects the prompt", "Try other images or sounds"
        ):
            processed = dict(self.own(text=[text], return_tensors="pt", **given, **options))
        processed.pop("video_metadata", None)  # only for the processor
        if len(processed["input_ids"]) != 1:
            raise PromptError(
                f"{self.model_type}'s processor makes {len(processed['input_ids'])} prompts of its own from one: run its "
                "images with 'transformers-multimodal'"
            )
        return processed

    @staticmethod
    def _video_options(videos: Sequence[Video]) -> dict[str, Any]:
        from transformers.video_utils import VideoMetadata

        told = [
            VideoMetadata(
                each.total, fps=each.fps, width=each.frames.shape[2], height=each.frames.shape[1],
                duration=each.total / each.fps, frames_indices=list(each.indices),
            )
            for each in videos
        ]  # fmt: skip
        # Some processors read the times of the frames from what is returned, without asking for it.
        options = {"video_metadata": told, "do_sample_frames": False, "return_metadata": True}
        return {"videos": [each.frames for each in videos], **options}


def _processor_of_images(own: Any, config: Any) -> Any:
    """The combined processor of the image processor's own model, if the folder names none and its type has another one.

    Pixtral's checkpoints have the type of LLaVA, whose processor would leave out the tokens between lines of rows.
    """
    import transformers

    reader = getattr(own, "image_processor", None)
    package = type(reader).__module__.rpartition(".")[0]
    if reader is None or type(own).__module__.rpartition(".")[0] == package:
        return own
    family = package.rpartition(".")[2]
    if family != getattr(getattr(config, "vision_config", None), "model_type", None):
        return own  # many models use another one's image processor
    name = next((each for each in dir(transformers) if each.lower() == f"{family}processor"), None)
    if name is None:
        return own
    patch = getattr(config.vision_config, "patch_size", None)
    merge = getattr(config, "spatial_merge_size", 1)
    found = getattr(transformers, name)(reader, own.tokenizer, patch_size=patch, spatial_merge_size=merge)
    found.chat_template = getattr(own, "chat_template", None)
    return found
