"""The digit-cards checkpoint: a LLaVA model in Transformers' classes, whose language part is the frozen SmolLM2-135M-Instruct.

`data/digit_cards` contains what was trained here (vision tower and projector). `folder` combines it with the language weights
from the smollm2-135m cache into an ordinary checkpoint folder, with vision and language in separate shards.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from ..package_data import data_folder
from .cache import cached_folder
from .pypi import SMOLLM2

NAME = "digit-cards"
VISION_FILE = "vision.safetensors"
IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = 16  # SmolLM2's `<empty_output>`, which chats do not use, so that the embedding table needs no new row
ROWS = 49  # tokens per image: 7 x 7 patches of 32 x 32 pixels
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def folder() -> Path:
    """Return the checkpoint's folder in the cache, assembled on first use: 540 MB, in seconds if smollm2-135m is already there.

    Raises:
        ModelError: no network for the language weights, no disk space, or an installation without `data/digit_cards`.
    """
    return cached_folder(NAME, assemble, source={"vision": _digest(vision_weights())})


def vision_weights() -> Path:
    """Return the file of the trained vision tower and projector.

    Raises:
        ModelError: the installation does not contain it.
    """
    return data_folder("data/digit_cards") / VISION_FILE


def assemble(made: Path) -> None:
    """Create the folder `made` and write the checkpoint into it: configuration, processor, tokenizer, both shards and their index."""
    language = SMOLLM2.folder()
    made.mkdir()
    configuration(language).save_pretrained(made)
    _write_processor(made, language)
    shutil.copyfile(vision_weights(), made / _SHARDS[0])
    with safe_open(language / "model.safetensors", framework="pt") as file:
        tensors = {f"language_model.{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, made / _SHARDS[1], metadata={"format": "pt"})
    with safe_open(made / _SHARDS[0], framework="pt") as file:
        weight_map = dict.fromkeys(file.keys(), _SHARDS[0])
    weight_map |= dict.fromkeys(tensors, _SHARDS[1])
    total = sum((made / shard).stat().st_size for shard in _SHARDS)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (made / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def configuration(language: Path) -> Any:
    """Return Transformers' configuration: a SigLIP tower, a two-layer projector, and the language model in folder `language`."""
    from transformers import AutoConfig, LlavaConfig, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=224,
        patch_size=32,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=AutoConfig.from_pretrained(language),
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=ROWS,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="full",  # SigLIP has no class token to drop
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def _write_processor(made: Path, language: Path) -> None:
    """Write SmolLM2's tokenizer with `<empty_output>` renamed to `<image>`, and a processor that expands it to an image's rows."""
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    renamed = (language / "tokenizer.json").read_text().replace('"<empty_output>"', f'"{IMAGE_TOKEN}"')
    (made / "tokenizer.json").write_text(renamed)
    settings = (language / "tokenizer_config.json").read_text().replace('"<empty_output>"', f'"{IMAGE_TOKEN}"')
    (made / "tokenizer_config.json").write_text(settings)
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size={"height": 224, "width": 224}),
        AutoTokenizer.from_pretrained(made),
        patch_size=32,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(made)


def _digest(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
