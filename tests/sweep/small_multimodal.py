"""Small random checkpoints of multimodal classes with a tokenizer and a processor, as if they were downloaded."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from .multimodal_settings import ALIASES, CHANGES, PARTS, PROCESSORS, TOKENS, UNNAMED
from .small_configs import SIZES, random_network, small_config

_SPECIAL = re.compile(r"""["'](<[^"'<>\s{}]{2,40}>|\[[A-Z_]{2,12}\]|\|[A-Z]{2,12}\|)["']""")
_CAPITALS = re.compile(r"<[A-Z]+_[A-Z_]+>")  # in the middle of a string
_OWN = re.compile(r"tokenizer(?:, \"|\.)(\w+_token)\b(?!_)")


def tokenizer_for(processor_class: Any, unnamed: bool = False) -> Any:
    """A byte-level tokenizer that knows every special token that the processor's source names.

    Args:
        unnamed: without attributes for tokens.
    """
    source = Path(inspect.getsourcefile(processor_class)).read_text()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(
        models.BPE(
            vocab={letter: number + 3 for number, letter in enumerate(alphabet)} | {"<pad>": 0, "<s>": 1, "</s>": 2},
            merges=[],
        )
    )
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    constants = {
        value for name, value in vars(processor_class).items() if name.endswith("_TOKEN") and isinstance(value, str)
    }
    names = sorted({*_SPECIAL.findall(source), *_CAPITALS.findall(source), *constants})
    own = (
        {}
        if unnamed
        else {
            name: f"<{name}>"
            for name in set(_OWN.findall(source))
            - {"add_bos_token", "add_eos_token", "pad_token", "bos_token", "eos_token", "unk_token"}
        }
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=own
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": sorted({*names, *own.values()})}, replace_extra_special_tokens=False
    )
    return tokenizer


_FLAT = {"feature_extractor": "audio"}


def _classes(names: Any) -> list[Any]:
    chosen = [names] if isinstance(names, str) else [names.get("torchvision"), names.get("pil")]
    return [getattr(transformers, name) for name in chosen if name]


def _part(kind: str, model_type: str, config: Any) -> Any:
    mapping = {
        "image_processor": IMAGE_PROCESSOR_MAPPING_NAMES,
        "video_processor": VIDEO_PROCESSOR_MAPPING_NAMES,
        "feature_extractor": FEATURE_EXTRACTOR_MAPPING_NAMES,
        "audio_processor": FEATURE_EXTRACTOR_MAPPING_NAMES,
    }.get(kind, {})
    names = mapping.get(model_type) or mapping.get(ALIASES.get(model_type, ""))
    if not names:
        raise ValueError(f"{model_type} has no {kind}")
    part = _classes(names)[0]
    settings = dict(PARTS.get((model_type, kind), {}))
    bins = getattr(getattr(config, "audio_config", None), "num_mel_bins", None)
    if bins and "feature_size" in inspect.signature(part.__init__).parameters:
        settings.setdefault("feature_size", bins)
    made = part()
    vision = getattr(config, "vision_config", None)
    sides = getattr(vision, "image_size", None)
    side = sides[0] if isinstance(sides, list | tuple) else sides or 32
    for name in ("size", "crop_size", "max_image_size", "video_size"):
        value = getattr(made, name, None)
        if value is None or isinstance(value, int) or name in settings:
            continue
        value = dict(value)
        value = {key: each for key, each in value.items() if each is not None}
        if set(value) == {"height", "width"}:
            settings[name] = {"height": side, "width": side}
        elif set(value) == {"shortest_edge", "longest_edge"}:
            settings[name] = (
                {"shortest_edge": 16 * 16 * 4, "longest_edge": 16 * 16 * 40}
                if value["longest_edge"] > 8000
                else {"shortest_edge": side, "longest_edge": side}
            )
        elif set(value) == {"longest_edge"}:
            settings[name] = {"longest_edge": 2 * side if name == "size" else side}
        elif set(value) == {"shortest_edge"}:
            settings[name] = {"shortest_edge": side}
    for name, source in (
        ("patch_size", "patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("spatial_merge_size", "spatial_merge_size"),
    ):
        if (
            hasattr(made, name)
            and getattr(made, name) is not None
            and (value := getattr(vision, source, None)) is not None
            and name not in settings
        ):
            settings[name] = value
    return part(**settings)


def small_processor(model_type: str, config: Any) -> Any:
    name = PROCESSOR_MAPPING_NAMES.get(model_type) or PROCESSOR_MAPPING_NAMES.get(ALIASES.get(model_type, ""))
    if name is None:
        raise ValueError(f"Transformers has no processor for {model_type}")
    processor_class = getattr(transformers, name)
    parts: dict[str, Any] = {}
    for name in processor_class.get_attributes():
        parts[name] = (
            tokenizer_for(processor_class, model_type in UNNAMED)
            if name.endswith("tokenizer")
            else _part(name, model_type, config)
        )
    settings = dict(PROCESSORS.get(model_type, {}))
    parameters = inspect.signature(processor_class.__init__).parameters
    vision = getattr(config, "vision_config", None)
    for name, value in (
        ("patch_size", getattr(vision, "patch_size", None)),
        ("vision_feature_select_strategy", getattr(config, "vision_feature_select_strategy", None)),
        ("spatial_merge_size", getattr(config, "spatial_merge_size", None)),
    ):
        if name in parameters and name not in settings and value is not None:
            settings[name] = value
    return processor_class(**parts, **settings)


def save_multimodal(folder: Path, class_name: str, model_type: str) -> Any:
    """Write a checkpoint of a class with random weights, tokenizer and processor."""
    network_class = getattr(transformers, class_name)
    own = network_class.config_class
    config = small_config(own if own.model_type and own.model_type == model_type else CONFIG_MAPPING[model_type])
    text = config.get_text_config()
    if hasattr(text, "max_position_embeddings"):
        text.max_position_embeddings = 4096
    if model_type in CHANGES:
        config = CHANGES[model_type](config) or config
    processor = small_processor(model_type, config)
    _match(config, processor)
    config.architectures = [class_name]
    network = random_network(network_class, config)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return network.eval()


def _share(config: Any, size: int) -> None:
    """Give every part of a configuration with the small vocabulary one of this size: some parts look up each other's tokens."""
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            _share(getattr(config, name), size)
    if getattr(config, "vocab_size", None) == SIZES["vocab_size"]:
        config.vocab_size = size


_IDS = {
    "vision_start_token_id": ("<|vision_start|>", "<|IMAGE_START|>"), "vision_end_token_id": ("<|vision_end|>", "<|IMAGE_END|>"),
    "image_start_token_id": ("<|begin_of_image|>",), "image_end_token_id": ("<|end_of_image|>",),
    "video_start_token_id": ("<|begin_of_video|>",), "video_end_token_id": ("<|end_of_video|>",),
}  # fmt: skip


def _match(config: Any, processor: Any) -> None:
    """Give a configuration the vocabulary and special tokens of a processor."""
    tokenizer = processor.tokenizer
    text = config.get_text_config()
    text.vocab_size = len(tokenizer) + 8
    _share(config, text.vocab_size)
    if hasattr(text, "vocab_size_per_layer_input"):
        text.vocab_size_per_layer_input = text.vocab_size
    for modality in ("image", "video", "audio"):
        # What an item's marker becomes is not always the marker.
        tokens = getattr(processor, f"{modality}_token_ids", None)
        token = tokens[0] if tokens else getattr(processor, f"{modality}_token_id", None)
        for part in (config, getattr(config, "thinker_config", None)):
            for name in (f"{modality}_token_id", f"{modality}_token_index"):
                if part is not None and hasattr(part, name) and isinstance(token, int):
                    setattr(part, name, token)
    for name, tokens in _IDS.items():
        for token in tokens:
            if hasattr(config, name) and token in tokenizer.get_vocab():
                setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    for name, token in TOKENS.get(config.model_type, {}).items():
        place, _, key = name.partition(".")
        if key:  # an entry of a dict
            getattr(config, place)[key] = tokenizer.convert_tokens_to_ids(token)
        else:
            setattr(config, name, tokenizer.convert_tokens_to_ids(token))
