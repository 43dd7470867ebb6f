"""A model's own preprocessing: its image processor or feature extractor, tokenizer and chat template.

They are loaded separately because Transformers' combined processor of a model that also takes videos requires
torchvision, which images do not need.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ModelError, PromptError, foreign_errors
from ..models.chat_template import template_limits
from .audio import AudioError, open_audio
from .images import MAX_PIXELS


class Processor:
    """Image processor (or, for audio models, feature extractor), tokenizer and chat template of a model folder.

    Args:
        folder: a local folder with the model's configuration files.
        config: the whole model's configuration.
        trusted: whether Python code that comes with the model may run.

    Raises:
        ModelError: a part is missing or damaged.
    """

    def __init__(self, folder: Path, config: Any, trusted: bool) -> None:
        from transformers import AutoTokenizer

        self.trusted, self.model_type = trusted, config.model_type
        self.tokenizer = self._load(AutoTokenizer, folder, "tokenizer")
        self.chat_template = self.tokenizer.chat_template or _stored_template(folder)
        self._reader: Any
        audio = getattr(config, "audio_config", None) is not None
        if audio:
            from transformers import AutoFeatureExtractor

            self._reader = self._load(AutoFeatureExtractor, folder, "feature extractor")
        else:
            from transformers import AutoImageProcessor

            self._reader = self._load(AutoImageProcessor, folder, "image processor", backend="pil")
            check_image_sizes(self._reader, folder)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings that determine how inputs are preprocessed, as plain JSON values, for cache keys."""
        return json.loads(json.dumps(self._reader.to_dict(), default=str, sort_keys=True))

    def images(self, images: Sequence[Image.Image], *, nested: bool = False, **options: Any) -> dict[str, Any]:
        """Return the tower's inputs (`pixel_values` and others, as tensors) for the images of one prompt.

        `nested` passes the images as a list of one list, which some processors require; `options` go to the processor.

        Raises:
            PromptError: the processor rejects the images.
        """
        grouped = [list(images)] if nested else list(images)
        with foreign_errors(PromptError, f"{self.model_type}'s image processor rejects the images", "Try other images"):
            return dict(self._reader(images=grouped, return_tensors="pt", **options))

    def audio(self, waves: Sequence[Any]) -> dict[str, Any]:
        """Return mel features `[sounds, bins, frames]` and their mask, of WAV files or waveforms.

        Raises:
            AudioError: a sound cannot be used, or is longer than the model takes.
        """
        rate = self._reader.sampling_rate
        sounds = [open_audio(wave, rate) for wave in waves]
        check_lengths(self._reader, sounds, self.model_type)
        with foreign_errors(
            PromptError, f"{self.model_type}'s feature extractor rejects the sounds", "Try other sounds"
        ):
            output = self._reader(
                sounds,
                sampling_rate=rate,
                return_tensors="pt",
                return_attention_mask=True,
                padding="max_length",
            )
        processed = dict(output)
        if "attention_mask" in processed:
            processed["feature_attention_mask"] = processed.pop("attention_mask")
        return processed

    def text(self, messages: list[dict]) -> str:
        """Return the chat as text by the model's template, with a marker at the position of each image or sound.

        Raises:
            PromptError: the model has no chat template.
        """
        if self.chat_template is None:
            raise PromptError(
                f"{self.model_type}: the model folder has no chat template; give build_prompt a text instead"
            )
        with template_limits(self.model_type):
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
            )
        return str(text)

    def _load(self, auto_class: Any, folder: Path, what: str, **options: Any) -> Any:
        with foreign_errors(ModelError, f"the {what} in {folder} cannot be read", "Fetch its files again"):
            return auto_class.from_pretrained(folder, trust_remote_code=self.trusted, **options)


def check_lengths(reader: Any, sounds: Sequence[Any], model_type: str) -> None:
    """Raise AudioError for a sound that is longer than a feature extractor takes: Whisper's would cut it without a word."""
    longest = getattr(reader, "n_samples", None)
    for number, sound in enumerate(sounds):
        if longest is not None and len(sound) > longest:
            rate = reader.sampling_rate
            raise AudioError(
                f"sound {number} lasts {len(sound) / rate:.1f} s but {model_type} takes {longest / rate:.0f} s: cut it "
                "into shorter sounds"
            )


def check_image_sizes(reader: Any, folder: Path) -> None:
    """Raise ModelError if a processor would make images of more than `MAX_PIXELS`, for example because its settings are damaged."""
    for name in ("size", "crop_size", "pad_size"):
        sizes = getattr(reader, name, None)
        width, height, edge, longest = (  # a dict, or Transformers' SizeDict
            sizes.get(side) if isinstance(sizes, Mapping) else getattr(sizes, side, None)
            for side in ("width", "height", "shortest_edge", "longest_edge")
        )
        if isinstance(width, int) and isinstance(height, int) and width * height > MAX_PIXELS:
            found = f"{width} x {height}"
        elif isinstance(edge, int) and longest is None and edge * edge > MAX_PIXELS:
            found = f"at least {edge} x {edge}"
        else:
            continue
        raise ModelError(
            f"{name} in the image processor's settings in {folder} is {found} pixels, over the limit of {MAX_PIXELS:,}: correct "
            "preprocessor_config.json, or fetch it again"
        )


def _stored_template(folder: Path) -> str | None:
    for name in ("chat_template.jinja", "chat_template.json"):
        path = folder / name
        if path.is_file():
            with foreign_errors(ModelError, f"{path} is not a chat template", "Correct it, or fetch it again"):
                text = path.read_text(encoding="utf-8")
                template = json.loads(text)["chat_template"] if name.endswith(".json") else text
                if not isinstance(template, str):
                    raise TypeError("the chat template is not a string")
                return template
    return None
