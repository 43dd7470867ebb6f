"""Small random vision-language and audio models of every family, saved in the layout of a downloaded checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

import workbench

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}
CLIP = {**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 16}
CLIP.pop("vision_use_head")
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "in_channels": 3,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
CHAT = (
    "{{% for message in messages %}}{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% else %}}{marker}{{% endif %}}{{% endfor %}}{{% endfor %}}"
)


IDEFICS_TOKENS = (
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
IDEFICS_SIZES = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}


def idefics_settings(vision):
    return {
        "vision_config": {**SIGLIP, "model_type": vision},
        "text_config": {**TEXT, "model_type": "llama"},
        "scale_factor": 2,
    }


@dataclass
class Vlm:
    """How to build one model: names of Transformers classes and their settings."""

    config: str
    model: str
    settings: dict[str, Any]
    preprocessor: str
    preprocessor_settings: dict[str, Any]
    token: str
    processor: str
    marker: str = ""
    tokens: tuple[str, ...] = ()
    token_key: str = "image_token_id"
    attributes: dict[str, str] = field(default_factory=dict)
    processor_settings: dict[str, Any] = field(default_factory=dict)


PIL = {"size": {"height": 56, "width": 56}}
VLMS = {
    "llava": Vlm(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {"vision_config": CLIP, "text_config": {**TEXT, "model_type": "llama"}, "vision_feature_layer": -2},
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
        "<image>",
        "LlavaProcessor",
        token_key="image_token_index",
        processor_settings={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "llava_onevision": Vlm(
        "LlavaOnevisionConfig",
        "LlavaOnevisionForConditionalGeneration",
        {
            "vision_config": SIGLIP,
            "text_config": {**TEXT, "model_type": "qwen2"},
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        "LlavaOnevisionImageProcessorPil",
        {**PIL, "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]},
        "<image>",
        "LlavaOnevisionProcessor",
        tokens=("<video>",),
        token_key="image_token_index",
        processor_settings={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "qwen2_vl": Vlm(
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        {
            "vision_config": {**QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
            "text_config": {**TEXT, "model_type": "qwen2_vl_text", "rope_parameters": MROPE},
        },
        "Qwen2VLImageProcessorPil",
        {"size": {"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 20}},
        "<|image_pad|>",
        "Qwen2VLProcessor",
        marker="<|vision_start|><|image_pad|><|vision_end|>",
        tokens=("<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
    ),
    "qwen2_5_vl": Vlm(
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "vision_config": {
                **QWEN_VISION,
                "out_hidden_size": 64,
                "intermediate_size": 48,
                "fullatt_block_indexes": [1],
                "window_size": 56,
            },
            "text_config": {**TEXT, "model_type": "qwen2_5_vl_text", "rope_parameters": MROPE},
        },
        "Qwen2VLImageProcessorPil",
        {"size": {"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 20}},
        "<|image_pad|>",
        "Qwen2_5_VLProcessor",
        marker="<|vision_start|><|image_pad|><|vision_end|>",
        tokens=("<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
    ),
    "qwen3_vl": Vlm(
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {
            "vision_config": {
                **QWEN_VISION,
                "patch_size": 16,
                "out_hidden_size": 64,
                "intermediate_size": 48,
                "deepstack_visual_indexes": [0, 1],
                "num_position_embeddings": 64,
            },
            "text_config": {
                **TEXT,
                "model_type": "qwen3_vl_text",
                "rope_parameters": {**MROPE, "mrope_interleaved": True},
            },
        },
        "Qwen2VLImageProcessorPil",
        {"patch_size": 16, "size": {"shortest_edge": 32 * 32 * 2, "longest_edge": 32 * 32 * 20}},
        "<|image_pad|>",
        "Qwen3VLProcessor",
        marker="<|vision_start|><|image_pad|><|vision_end|>",
        tokens=("<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
    ),
    "internvl": Vlm(
        "InternVLConfig",
        "InternVLForConditionalGeneration",
        {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": [56, 56],
                "patch_size": [14, 14],
            },
            "text_config": {**TEXT, "model_type": "qwen2"},
        },
        "GotOcr2ImageProcessorPil",
        {**PIL, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
        "<IMG_CONTEXT>",
        "InternVLProcessor",
        tokens=("<img>", "</img>", "<video>"),
        attributes={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        processor_settings={"image_seq_length": 4},
    ),
    "gemma3": Vlm(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "vision_config": SIGLIP,
            "text_config": {
                **TEXT,
                "model_type": "gemma3_text",
                "num_hidden_layers": 4,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            "mm_tokens_per_image": 4,
        },
        "Gemma3ImageProcessorPil",
        PIL,
        "<image_soft_token>",
        "Gemma3Processor",
        marker="<start_of_image>",
        tokens=("<start_of_image>", "<end_of_image>"),
        attributes={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        processor_settings={"image_seq_length": 4},
    ),
    "paligemma": Vlm(
        "PaliGemmaConfig",
        "PaliGemmaForConditionalGeneration",
        {
            "vision_config": {**SIGLIP, "projection_dim": 64},
            "text_config": {**TEXT, "model_type": "gemma"},
            "projection_dim": 64,
        },
        "SiglipImageProcessorPil",
        PIL,
        "<image>",
        "PaliGemmaProcessor",
        tokens=("<bos>",),
        token_key="image_token_index",
        attributes={"bos_token": "<bos>"},
    ),
    "idefics3": Vlm(
        "Idefics3Config",
        "Idefics3ForConditionalGeneration",
        idefics_settings("idefics3_vision"),
        "Idefics3ImageProcessorPil",
        IDEFICS_SIZES,
        "<image>",
        "Idefics3Processor",
        tokens=IDEFICS_TOKENS,
        processor_settings={"image_seq_len": 4},
    ),
    "smolvlm": Vlm(
        "SmolVLMConfig",
        "SmolVLMForConditionalGeneration",
        idefics_settings("smolvlm_vision"),
        "SmolVLMImageProcessorPil",
        IDEFICS_SIZES,
        "<image>",
        "SmolVLMProcessor",
        tokens=IDEFICS_TOKENS,
        attributes={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        processor_settings={"image_seq_len": 4},
    ),
}
SOUND = Vlm(
    "Qwen2AudioConfig",
    "Qwen2AudioForConditionalGeneration",
    {
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "num_mel_bins": 16,
            "max_source_positions": 50,
        },
        "text_config": {**TEXT, "model_type": "qwen2"},
    },
    "WhisperFeatureExtractor",
    {"feature_size": 16, "chunk_length": 1},
    "<|AUDIO|>",
    "Qwen2AudioProcessor",
    marker="<|audio_bos|><|AUDIO|><|audio_eos|>",
    tokens=("<|audio_bos|>", "<|audio_eos|>"),
    token_key="audio_token_index",
)


def save_vlm(folder: Path, vlm: Vlm) -> workbench.Model:
    """Save and load a model with random weights, with its tokenizer, processor and chat template."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(workbench.load_model("smollm2-135m").path)
    tokenizer.add_special_tokens({"additional_special_tokens": [vlm.token, *vlm.tokens]})
    for name, token in vlm.attributes.items():
        setattr(tokenizer, name, token)
    tokenizer.chat_template = CHAT.format(marker=vlm.marker or vlm.token)
    tokenizer.save_pretrained(folder)
    settings = {**vlm.settings, vlm.token_key: tokenizer.convert_tokens_to_ids(vlm.token)}
    settings["text_config"] = {**settings["text_config"], "vocab_size": len(tokenizer)}
    for key, token in (("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>")):
        if token in vlm.tokens:
            settings[key] = tokenizer.convert_tokens_to_ids(token)
    for key in ("video_token_id", "video_token_index"):
        settings[key] = tokenizer.convert_tokens_to_ids(
            "<|video_pad|>" if "<|video_pad|>" in vlm.tokens else "<|endoftext|>"
        )
    config = getattr(transformers, vlm.config)(**settings)
    config.architectures = [vlm.model]
    network = getattr(transformers, vlm.model)(config)
    for name, parameter in network.named_parameters():
        center = 1.0 if "norm" in name and name.endswith("weight") and "gemma" not in vlm.config.lower() else 0.0
        torch.nn.init.normal_(parameter, center, 0.1)
    network.save_pretrained(folder)
    preprocessor(vlm).save_pretrained(folder)
    return workbench.load_model(folder)


def preprocessor(vlm: Vlm) -> Any:
    """The image processor or feature extractor."""
    return getattr(transformers, vlm.preprocessor)(**vlm.preprocessor_settings)
