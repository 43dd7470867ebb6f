"""Small random models of every causal language class in the installed Transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

LARGEST = 30_000_000
"""Parameters above which a configuration was not made small: its sizes have other names than those below."""

_LAYERS = dict.fromkeys(
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 4
)
_WIDTHS = dict.fromkeys(
    ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "hidden_dim", "model_dim", "embed_dim", "lru_width"), 64
)  # fmt: skip
_HEADS = dict.fromkeys(
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
     "num_decoder_attention_heads"), 4
)  # fmt: skip
_MLPS = dict.fromkeys(
    ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 96
)  # fmt: skip
_EXPERTS = dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4)
_CHOSEN = dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k", "moe_topk"), 2)
_EXPERT_MLPS = dict.fromkeys(
    ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size", "shared_intermediate_size",
     "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 48
)  # fmt: skip
_LENGTHS = dict.fromkeys(("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"), 256)
_STATES = {
    "state_size": 16, "ssm_state_size": 16, "mamba_d_state": 16, "mamba_d_head": 16, "mamba_n_heads": 8, "mamba_num_heads": 8,
    "mamba_head_dim": 16, "mamba_d_ssm": 128, "mamba_n_groups": 1, "n_groups": 1, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
# Not the values at which a scale does nothing, so that a forgotten one shows.
_SCALES = {
    "logits_scaling": 8.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.5, "logit_scale": 0.25, "scale_emb": 3.0,
    "scale_depth": 1.4,
}  # fmt: skip
SIZES: dict[str, Any] = {
    **_LAYERS, **_WIDTHS, **_HEADS, **_MLPS, **_EXPERTS, **_CHOSEN, **_EXPERT_MLPS, **_LENGTHS, **_STATES, **_SCALES,
    "vocab_size": 128, "num_key_value_heads": 2, "head_dim": 16, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "qk_head_dim": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 8, "max_window_layers": 1,
    "image_size": 32, "patch_size": 8, "depth": 2, "out_hidden_size": 64, "projection_dim": 64, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16,
}  # fmt: skip

_FULL = ["sliding_attention", "full_attention"] * 2
_MLA = {
    "head_dim": 8,
    "num_key_value_heads": 4,
}  # latent attention has as many keys as queries; its rope has 8 dimensions
_INDEXED = {**_MLA, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "axk2": _INDEXED, "deepseek_v32": _INDEXED, "glm_moe_dsa": _INDEXED,
    "longcat_flash": _MLA,
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8}, "gptj": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "num_key_value_heads": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 16,
        "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "shared_experts_intermediate_size": 48, "head_dim": 16,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": _FULL, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 2,
    },
    "reformer": {
        "axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 2, "num_buckets": 2, "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4, "attention_head_size": 16, "feed_forward_size": 96,
    },
    "xlstm": {"num_heads": 1, "qk_dim_factor": 1.0, "mode": "inference"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 9, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 3},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [48, 48]},
    "glm5_next_text": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0},
    "florence_vision": {
        "depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1), "patch_prenorm": (False, True),
        "embed_dim": (32, 64), "num_heads": (4, 4), "num_groups": (4, 4), "window_size": 4,
    },
    "inkling2_vision": {"text_hidden_size": 64},
    "mistral_large4_text": _MLA,
    "zaya": {"num_experts_per_tok": 1},
    "molmo2_vision": {"image_size": [32, 32]}, "molmo2_text": {"additional_vocab_size": 0},
    "molmo2": {
        "adapter_config": {
            "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
            "text_hidden_size": 64, "vision_feature_layer": [-1, -2],
        },
    },
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 127},
    "nemotron3_diarization": {"head_config": {"audio_hidden_size": 64}},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64, "mlp_layer_types": ["dense", "sparse"] * 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "fun_asr_nano": {
        "adaptor_config": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 16, "projector_hidden_size": 64},
    },
    "radio": {"video_temporal_patch_size": 2, "max_img_size": 128},
}  # fmt: skip
# Types with M-RoPE, and the part of each head that it rotates.
MROPE = {
    "qwen2_vl_text": 1, "qwen2_5_vl_text": 1, "qwen2_5_omni_text": 1, "paddleocr_vl_text": 1, "glm4v_text": 1, "glm4v_moe_text": 0.5,
    "glm_ocr_text": 1, "hunyuan_vl_text": 1, "cosmos3_edge_text": 1,
}  # fmt: skip
# Without `is_decoder` these are encoders, whose tokens attend to later ones.
ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "reformer", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


def causal_classes() -> dict[str, str]:
    """`{class: model type}` of every class for causal language modelling, of types whose configuration is its own if there are several.

    A multimodal configuration in that mapping names the class for its language model: the language model's own type is taken.
    """
    found: dict[str, str] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        composite = bool(getattr(CONFIG_MAPPING[model_type], "sub_configs", None))
        if name not in found or (not composite and name in found):
            found[name] = model_type if name not in found or not composite else found[name]
    return found


def multimodal_classes() -> dict[str, str]:
    """`{class: model type}` of every class that takes images, video or sound beside text, and is not in `causal_classes`."""
    mappings = (MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    causal = causal_classes()
    return {name: model_type for each in mappings for model_type, name in each.items() if name not in causal}


def multimodal_types() -> dict[str, str]:
    """`{model type: class}` of everything that takes images, video or sound beside text."""
    return {**MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}


def small_config(config_class: Any) -> Any:
    """A configuration of a class, small, with scales that show; its parts are made small, too."""
    model_type = config_class.model_type
    known = {name for each in config_class.__mro__ for name in getattr(each, "__annotations__", {})}
    settings = {name: value for name, value in SIZES.items() if name in known}
    for name in getattr(config_class, "sub_configs", None) or {}:
        part = getattr(config_class(), name, None)
        if part is not None and name not in SETTINGS.get(model_type, {}):
            settings[name] = small_config(type(part)).to_dict()
    if model_type in ENCODERS:
        settings["is_decoder"] = True
    if model_type in MROPE:
        pairs = 16 * MROPE[model_type] // 2  # of a head of 16
        sections = [int(pairs - 2 * (3 * pairs // 8)), int(3 * pairs // 8), int(3 * pairs // 8)]
        settings["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": sections,
            "partial_rotary_factor": MROPE[model_type],
        }
    return config_class(**{**settings, **SETTINGS.get(model_type, {})})


def small_network(class_name: str, model_type: str) -> Any:
    """A random model; every parameter is drawn, so that none has a value at which it does nothing.

    Raises:
        ValueError: the configuration was not made small.
    """
    network_class = getattr(transformers, class_name)
    own = network_class.config_class
    config = small_config(
        own if own.model_type and not getattr(own, "sub_configs", None) else CONFIG_MAPPING[model_type]
    )
    return random_network(network_class, config)


def random_network(network_class: Any, config: Any) -> Any:
    """A model of a configuration, of which every parameter is drawn.

    Raises:
        ValueError: the configuration was not made small.
    """
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in network_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    network = network_class(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.08)
            elif parameter.is_floating_point():
                parameter += 0.1 * torch.randn_like(parameter)
    return network
