"""A model's own preparation of pictures and sounds, loaded part by part.

Transformers' combined processors cannot be built without torchvision where a model also takes videos, though pictures need none
of it; image processor, tokenizer and feature extractor can, each by itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ModelError, PromptError
from .sounds import SoundError, open_sound


class Processor:
    """Image processor or feature extractor, tokenizer and chat template of a model folder.

    Raises:
        ModelError: a part that is missing or damaged.
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

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that decides what a picture becomes, for cache keys."""
        return json.loads(json.dumps(self._reader.to_dict(), default=str, sort_keys=True))

    def images(self, pictures: Sequence[Image.Image], *, nested: bool = False, **options: Any) -> dict[str, Any]:
        """Pixel values, and what goes with them, of the pictures of one prompt; `nested` says so to the image processor."""
        grouped = [list(pictures)] if nested else list(pictures)
        try:
            return dict(self._reader(images=grouped, return_tensors="pt", **options))
        except (ValueError, TypeError, RuntimeError) as error:
            raise PromptError(f"{self.model_type}'s image processor refuses the pictures: {error}") from error

    def audio(self, waves: Sequence[Any]) -> dict[str, Any]:
        """Mel features `[sounds, bins, frames]` and their mask, of WAV files or waveforms."""
        rate = self._reader.sampling_rate
        heard = [open_sound(wave, rate) for wave in waves]
        longest = getattr(self._reader, "n_samples", None)
        for number, sound in enumerate(heard):
            if longest is not None and len(sound) > longest:  # Whisper's extractor would cut it without a word
                raise SoundError(
                    f"sound {number} lasts {len(sound) / rate:.1f} s and {self.model_type} hears {longest / rate:.0f} s: cut it "
                    "into pieces"
                )
        output = self._reader(
            heard,
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
        """The chat as text, markers where pictures and sounds go."""
        if self.chat_template is None:
            raise PromptError(
                f"{self.model_type}: the model folder has no chat template; give build_prompt a text instead"
            )
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
        )
        return str(text)

    def _load(self, auto_class: Any, folder: Path, what: str, **options: Any) -> Any:
        try:
            return auto_class.from_pretrained(folder, trust_remote_code=self.trusted, **options)
        except Exception as error:  # Transformers raises many kinds for a damaged folder
            raise ModelError(f"the {what} in {folder} cannot be read: {error}") from error


def _stored_template(folder: Path) -> str | None:
    for name in ("chat_template.jinja", "chat_template.json"):
        path = folder / name
        if path.is_file():
            text = path.read_text()
            return json.loads(text)["chat_template"] if name.endswith(".json") else text
    return None
