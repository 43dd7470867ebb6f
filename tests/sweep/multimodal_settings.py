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


_TILES = [[32, 64], [64, 32], [64, 64]]


def _gemma3(config: Any) -> None:
    config.mm_tokens_per_image = 4
    config.text_config.layer_types = ["sliding_attention", "full_attention"] * 2


def _tiled(config: Any) -> None:
    config.image_grid_pinpoints = _TILES


def _internvl(config: Any) -> None:
    config.image_seq_length = 4


def _cohere2_vision(config: Any) -> None:
    config.alignment_intermediate_size = 64


def _got_ocr2(config: Any) -> None:
    # The processor always writes 256 tokens: the side in patches is 64, of which 4 make a token.
    config.vision_config.image_size, config.vision_config.patch_size = 128, 2
    config.vision_config.num_hidden_layers, config.vision_config.global_attn_indexes = 2, []


def _kimi_k25(config: Any) -> None:
    config.projection_hidden_size = 64


def _complete(config: Any) -> None:
    """Add the parts that a configuration has only if they are asked for."""
    for name, part in config.sub_configs.items():
        if getattr(config, name, None) is None:
            setattr(config, name, small_config(part))


def _gemma4(config: Any) -> None:
    _complete(config)
    config.vision_config.position_embedding_size = 64
    config.audio_config.subsampling_conv_channels, config.audio_config.output_proj_dims = [128, 4], 64


def _gemma4_unified(config: Any) -> None:
    _complete(config)
    # The class lets an image attend to itself beyond the window, which spans do not: no image is longer.
    config.text_config.sliding_window = 80


def _llama4(config: Any) -> None:
    vision = config.vision_config
    vision.vision_output_dim = vision.projector_input_dim = vision.projector_output_dim = 64
    vision.intermediate_size = 256  # of four patches side by side
    config.text_config.intermediate_size_mlp = 96


def _lfm2_vl(config: Any) -> None:
    config.projector_hidden_size = 64
    config.text_config.layer_types = ["conv", "full_attention"] * 2


def _deepseek_vl_hybrid(config: Any) -> None:
    config.high_res_vision_config.image_size, config.high_res_vision_config.output_channels = 64, 8
    config.high_res_vision_config.global_attn_indexes = [1, 3]


def _granite4_vision(config: Any) -> None:
    _tiled(config)
    config.downsample_rate, config.deepstack_layer_map, config.spatial_target_layers = "1/2", [(1, 0), (2, 2)], [3]


def _aria(config: Any) -> None:
    # The processor resizes every image to 980 pixels.
    config.vision_config.image_size, config.vision_config.patch_size = 980, 98
    config.projector_patch_to_query_dict, config.max_value_projector_patch_to_query_dict = {100: 4}, 4


def _cosmos3_edge(config: Any) -> None:
    config.projector_hidden_size = 96


def _inkling2(config: Any) -> None:
    config.vision_config.projection_hidden_dim = 64


def _ernie4_5_vl_moe(config: Any) -> None:
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}


def _deepseek_ocr2(config: Any) -> None:
    # The tower always makes 12 x 12 or 16 x 16 rows: 48 patches on a side, of which 4 make a row.
    sam = config.vision_config.sam_config
    sam.image_size, sam.patch_size, sam.global_attn_indexes = 96, 2, []
    sam.output_channels, sam.downsample_channels = 8, [16, config.vision_config.encoder_config.hidden_size]
    config.text_config.mlp_layer_types = ["dense", "sparse"] * 2


def _small_codes(config: Any) -> None:
    """Images as codes of a small codebook."""
    codes = config.vq_config
    codes.base_channels, codes.channel_multiplier, codes.num_res_blocks = 32, [1, 1], 1
    for name, value in (("latent_channels", 32), ("num_embeddings", 16), ("codebook_size", 16), ("resolution", 32)):
        if hasattr(codes, name):
            setattr(codes, name, value)


def _janus(config: Any) -> None:
    _small_codes(config)
    config.vq_config.image_token_embed_dim = 64
    config.vision_config.num_image_tokens = 16


def _emu3(config: Any) -> None:
    _small_codes(config)
    config.vq_config.hidden_size, config.vq_config.channel_multiplier = 32, [1, 1, 1, 1]
    config.vocabulary_map = {f"<|visual token {code:06d}|>": 30 + code for code in range(16)}


def _chameleon(config: Any) -> None:
    _small_codes(config)
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    config.vocabulary_map = {f"IMGIMG{str(code).translate(letters)}Z": 30 + code for code in range(16)}


def _mllama(config: Any) -> None:
    config.text_config.cross_attention_layers = [1, 3]
    vision = config.vision_config
    vision.num_global_layers, vision.attention_heads, vision.intermediate_layers_indices = 1, 4, [1, 3]
    vision.vision_output_dim = 3 * 64  # of the last layer and of those two


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
    "gemma3": _gemma3,
    "llava_next": _tiled,
    "llava_next_video": _tiled,
    "llava_onevision": _tiled,
    "internvl": _internvl,
    "cohere2_vision": _cohere2_vision,
    "got_ocr2": _got_ocr2,
    "kimi_k25": _kimi_k25,
    "gemma4": _gemma4,
    "gemma4_unified": _gemma4_unified,
    "llama4": _llama4,
    "lfm2_vl": _lfm2_vl,
    "deepseek_vl_hybrid": _deepseek_vl_hybrid,
    "granite4_vision": _granite4_vision,
    "aria": _aria,
    "cosmos3_edge": _cosmos3_edge,
    "inkling2": _inkling2,
    "ernie4_5_vl_moe": _ernie4_5_vl_moe,
    "deepseek_ocr2": _deepseek_ocr2,
    "janus": _janus,
    "emu3": _emu3,
    "chameleon": _chameleon,
    "mllama": _mllama,
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
    ("llava_next", "image_processor"): {"image_grid_pinpoints": _TILES},
    ("llava_next_video", "image_processor"): {"image_grid_pinpoints": _TILES},
    ("llava_onevision", "image_processor"): {"image_grid_pinpoints": _TILES},
    ("paligemma", "image_processor"): {"image_seq_length": 16},
    ("gemma4", "image_processor"): {"max_soft_tokens": 70},
    ("gemma4_unified", "image_processor"): {"max_soft_tokens": 70},
    ("gemma4", "video_processor"): {"max_soft_tokens": 70},
    ("llama4", "image_processor"): {"do_normalize": False},  # it would make bfloat16, which the float32 class rejects
    ("inkling2", "image_processor"): {"size": {"height": 16, "width": 16}},
    ("deepseek_ocr2", "image_processor"): {"size": {"height": 96, "width": 96}, "tile_size": 96},
    ("ernie4_5_vl_moe", "video_processor"): {"draw_on_frames": False},
    ("fuyu", "image_processor"): {"size": {"height": 32, "width": 32}, "patch_size": {"height": 8, "width": 8}},
    ("emu3", "image_processor"): {"min_pixels": 32 * 32, "max_pixels": 64 * 64},
    ("inkling_mm_model", "image_processor"): {"size": {"height": 8, "width": 8}},
    ("granite4_vision", "image_processor"): {"image_grid_pinpoints": _TILES},
    ("lfm2_vl", "image_processor"): {
        "encoder_patch_size": 8,
        "tile_size": 32,
        "min_image_tokens": 1,
        "max_image_tokens": 4,
        "max_pixels_tolerance": 1.0,
    },
    ("deepseek_vl_hybrid", "image_processor"): {"high_res_size": {"height": 64, "width": 64}},
    ("cohere2_vision", "image_processor"): {"patch_size": 2},  # the side of a tile in rows
}
# Settings of the processor itself.
PROCESSORS: dict[str, dict[str, Any]] = {
    "ovis2": {"image_seq_length": 16},
    "qianfan_ocr": {"image_seq_length": 4},
    "unlimited_ocr": {"patch_size": 8},
    "shieldgemma2": {
        "chat_template": "{% for part in messages[0].content %}{{ part.text or '<boi_token>' }}{% endfor %}"
    },
    "gemma3": {"image_seq_length": 4},
    "llava": {"num_additional_image_tokens": 1},
    "llava_next": {"num_additional_image_tokens": 1},
    "llava_next_video": {"num_additional_image_tokens": 1},
    "llava_onevision": {"num_image_tokens": 16},
    "internvl": {"image_seq_length": 4},
    "idefics3": {"image_seq_len": 4},
    "smolvlm": {"image_seq_len": 4},
    "aya_vision": {"img_size": 32, "downsample_factor": 2},
    "deepseek_vl": {"num_image_tokens": 16},
    "deepseek_vl_hybrid": {"num_image_tokens": 16},
    "granite_docling": {"image_seq_len": 1},
    "deepseek_ocr2": {"patch_size": 2},
    "janus": {"num_image_tokens": 16},
    "chameleon": {"image_seq_length": 256},
    "blip-2": {"num_query_tokens": 32},
    "instructblip": {"num_query_tokens": 32},
    "aria": {"size_conversion": {980: 4}},
    "granite4_vision": {"num_additional_image_tokens": 1, "downsample_rate": "1/2"},
}
# Frames of a video are written with the image token: only these tell them from images. Chat templates write them.
_GLM_VIDEO = {"video": "<|begin_of_video|><video_token><|end_of_video|>"}
# Texts that stand for an item, where the bare marker is not enough.
MARKERS: dict[str, dict[str, str]] = {
    "glm4v": _GLM_VIDEO,
    "glm4v_moe": _GLM_VIDEO,
    "glm46v": _GLM_VIDEO,
    "glm_ocr": _GLM_VIDEO,
    "glm5_next": _GLM_VIDEO,
    "fuyu": {"image": ""},
    "blip-2": {"image": ""},  # its processor puts the image before the text
    "instructblip": {"image": ""},
    "hunyuan_vl": {"image": "<image_start_token><image_token><image_end_token>"},
    "glmga": _GLM_VIDEO,
}
# Types whose tokenizers must not name the image token: their processors add it themselves.
UNNAMED = ("blip-2", "instructblip")
_THINKER: dict[str, Any] = {"vision_start_token_id": "<vision_bos_token>", "audio_start_token_id": "<audio_bos_token>"}
# Tokens whose ids a configuration names, where the processor does not say so; `a.b` is the entry b of the dict a.
TOKENS: dict[str, dict[str, Any]] = {
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
    "llama4": {"image_token_index": "<|patch|>"},
    "fuyu": {"image_token_id": "|SPEAKER|"},
    "blip-2": {"image_token_index": "<image>"},
    "instructblip": {"image_token_index": "<image>"},
    "janus": {"image_token_id": "<image_token>"},
    "emu3": {"vocabulary_map.<image>": "<image_token>", "vocabulary_map.<|extra_200|>": "<pad>"},
    "chameleon": {"vocabulary_map.<image>": "<image>"},
}
