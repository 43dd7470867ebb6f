"""What small checkpoints of multimodal classes need beside the sizes of `small_configs.py`: settings that have to agree with each other."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .small_configs import small_config

# Types whose processors are registered under another type.
ALIASES = {
    "qwen3_vl_moe": "qwen3_vl", "glm4v_moe": "glm4v", "glm_ocr": "glm46v", "glmga": "glm46v", "fast_vlm": "llava",
    "cosmos3_omni": "qwen3_vl", "nemotron_h_omni": "parakeet_encoder", "diffusion_gemma": "gemma4",
    "qwen2_5_omni_thinker": "qwen2_5_omni", "qwen3_omni_moe_thinker": "qwen3_omni_moe",
}  # fmt: skip


def _small(model_type: str, **settings: Any) -> Any:
    """A part that its configuration leaves out unless it is named."""
    config = small_config(CONFIG_MAPPING[model_type])
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def _interleaved_mrope(config: Any) -> None:
    text = config.get_text_config()
    text.rope_parameters = {
        **(text.rope_parameters or {}),
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    }


def _qwen3_vl(config: Any) -> None:
    _interleaved_mrope(config)
    config.vision_config.deepstack_visual_indexes = [0, 1]


def _sound_rows(config: Any) -> None:
    """An audio tower without a projector has rows of the language model's width."""
    config.audio_config.output_dim = config.get_text_config().hidden_size


def _qwen2_5_omni_thinker(config: Any) -> None:
    _sound_rows(config)
    config.vision_config.fullatt_block_indexes = [1]


def _qwen3_omni_thinker(config: Any) -> None:
    _sound_rows(config)
    _qwen3_vl(config)


def _muse_glimmer(config: Any) -> None:
    config.out_hidden_size = config.vision_config.hidden_size * config.vision_config.merge_size**2
    config.projector_hidden_size = 64


def _vipllava(config: Any) -> None:
    config.vision_feature_layers = [-2, -1]


def _qianfan_ocr(config: Any) -> None:
    config.vision_config.image_size, config.vision_config.patch_size = [32, 32], [8, 8]
    config.image_seq_length = 4


def _muse_spark(config: Any) -> None:
    _muse_glimmer(config)
    config.text_config.moe_hidden_size = 64
    config.audio_config.hidden_sizes, config.audio_config.depths = [16, 16, 32, 32], [1, 1, 1, 1]
    config.audio_config.out_hidden_size = config.text_config.hidden_size


def _nemotron_h_omni(config: Any) -> None:
    config.vision_hidden_size = config.vision_config.hidden_size
    config.projector_hidden_size = 64
    settings = {"attention_bias": False, "scale_input": False, "projection_hidden_size": 64, "projection_bias": False}
    config.audio_config = _small("parakeet_encoder", **settings)


def _unlimited_ocr(config: Any) -> None:
    sam, encoder = config.vision_config.sam_config, config.vision_config.encoder_config
    sam.image_size, sam.patch_size, sam.window_size, sam.global_attn_indexes, sam.mlp_dim = 64, 8, 2, [1], 96
    sam.output_channels, sam.downsample_channels = 32, [48, encoder.hidden_size]


def _small_patches(config: Any) -> None:
    """The processor does not resize videos: their sides have to be whole numbers of merged patches."""
    config.vision_config.patch_size = 4


def _step3p7(config: Any) -> None:
    config.vision_config.image_size, config.vision_config.max_position_embeddings = 64, 64


def _omni(change: Any) -> Any:
    """A model that can also speak: the parts for that are left out, the rest is a thinker."""

    def changed(config: Any) -> None:
        config.enable_audio_output = False
        change(config.thinker_config)

    return changed


def _vibevoice_asr(config: Any) -> None:
    for part in (config.acoustic_tokenizer_encoder_config, config.semantic_tokenizer_encoder_config):
        part.num_filters, part.downsampling_ratios, part.depths = 4, [8, 10, 10], [1, 1, 1, 1]


def _kyutai(config: Any) -> None:
    config.num_codebooks, config.codebook_vocab_size, config.audio_pad_token_id, config.audio_bos_token_id = 4, 33, 0, 1
    config.codec_config.upsample_groups = config.codec_config.hidden_size


# Changes of a configuration after it was made small, in place.
CHANGES: dict[str, Any] = {
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl,
    "qwen3_asr": _sound_rows,
    "qwen2_5_omni_thinker": _qwen2_5_omni_thinker,
    "qwen3_omni_moe_thinker": _qwen3_omni_thinker,
    "muse_glimmer": _muse_glimmer,
    "vipllava": _vipllava,
    "qianfan_ocr": _qianfan_ocr,
    "cosmos3_omni": _qwen3_vl,
    "muse_spark": _muse_spark,
    "nemotron_h_omni": _nemotron_h_omni,
    "unlimited_ocr": _unlimited_ocr,
    "minimax_m3_vl": _small_patches,
    "step3p7": _step3p7,
    "qwen2_5_omni": _omni(_qwen2_5_omni_thinker),
    "qwen3_omni_moe": _omni(_qwen3_omni_thinker),
    "kyutai_speech_to_text": _kyutai,
    "vibevoice_asr": _vibevoice_asr,
}
# Settings of (type, part of the processor).
PARTS: dict[tuple[str, str], dict[str, Any]] = {
    ("molmo2", "image_processor"): {"overlap_margins": [1, 1], "max_crops": 2},
    ("unlimited_ocr", "image_processor"): {"size": {"height": 64, "width": 64}, "tile_size": 32},
    ("nemotron_h_omni", "image_processor"): {"min_num_patches": 4, "max_num_patches": 64},
    ("nemotron_h_omni", "video_processor"): {
        "video_target_num_patches": 16,
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
    },
    ("step3p7", "image_processor"): {"patch_size": 32, "max_image_size": 128, "vision_patch_size": 8},
}
# Settings of the processor itself.
PROCESSORS: dict[str, dict[str, Any]] = {
    "ovis2": {"image_seq_length": 16},
    "qianfan_ocr": {"image_seq_length": 4},
    "unlimited_ocr": {"patch_size": 8},
    "shieldgemma2": {
        "chat_template": "{% for part in messages[0].content %}{{ part.text or '<boi_token>' }}{% endfor %}"
    },
}
# Fields of a configuration with the ids of tokens that only this type has.
_THINKER: dict[str, Any] = {"vision_start_token_id": "<vision_bos_token>", "audio_start_token_id": "<audio_bos_token>"}
TOKENS: dict[str, dict[str, str | list[str]]] = {
    "qwen2_5_omni_thinker": _THINKER,
    "qwen3_omni_moe_thinker": _THINKER,
    "molmo2": {
        "image_patch_id": "<im_patch>",
        "image_start_token_id": "<im_start>",
        "image_end_token_id": "<im_end>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    },
    "ovis2": {
        "image_token_id": "<IMG_ATOM>",
        "visual_indicator_token_ids": ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"],
    },
}
# Texts that stand for an item, where the bare marker is not enough.
_GLM_VIDEO = {"video": "<|begin_of_video|><video_token><|end_of_video|>"}
MARKERS: dict[str, dict[str, str]] = dict.fromkeys(("glm4v", "glm4v_moe", "glm_ocr", "glm46v", "glmga"), _GLM_VIDEO)
