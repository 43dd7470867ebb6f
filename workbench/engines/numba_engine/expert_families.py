"""Families with mixtures of experts, linear or latent attention: `DecoderConfig` fields from their configurations."""

from __future__ import annotations

import math
from typing import Any

from range_kernels.experts import ClippedGate

from ...errors import ModelError
from .architectures import AttentionBlocks, DeltaNetConfig, LatentConfig, MixtureConfig, Names, QueryScale
from .dense_families import ernie, granite, qwen3, qwen3_vl
from .layer_settings import mrope_sections, ropes_where, same_window, windows
from .rope import read_rope


def granite_moe(config: Any) -> dict[str, Any]:
    stacked = ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")
    mixture = mixture_config(
        config, config.intermediate_size, scores="softmax of chosen", stacked=stacked, router="block_sparse_moe.router.layer"
    )  # fmt: skip
    return {**granite(config), "mixture": mixture}


def ernie_moe(config: Any) -> dict[str, Any]:
    layers = tuple(
        (number + 1) % config.moe_layer_interval == 0
        and config.moe_layer_start_index <= number <= config.moe_layer_end_index
        for number in range(config.num_hidden_layers)
    )
    mixture = mixture_config(
        config, config.moe_intermediate_size, layers=layers, wide_router=True, choice_bias="mlp.moe_statics.e_score_correction_bias",
        floor=config.moe_norm_min, floor_added=False, shared_intermediate=config.moe_intermediate_size * config.moe_num_shared_experts,
        shared_bias=config.use_bias,
    )  # fmt: skip
    return {**ernie(config), "mixture": mixture}


def mixtral(config: Any) -> dict[str, Any]:
    return {"windows": same_window(config), "mixture": mixtral_experts(config)}


def minimax_m2(config: Any) -> dict[str, Any]:
    mixture = mixtral_experts(config, scores="sigmoid", choice_bias="block_sparse_moe.e_score_correction_bias")
    return {"head_norms": True, "wide_head_norms": True, "mixture": mixture}


def mixtral_experts(config: Any, **more: Any) -> MixtureConfig:
    at = "block_sparse_moe"
    return mixture_config(
        config, config.intermediate_size, router=f"{at}.gate", experts=f"{at}.experts", parts=("w1", "w3", "w2"), **more
    )  # fmt: skip


def qwen2_moe(config: Any) -> dict[str, Any]:
    mixture = qwen_experts(
        config, shared="mlp.shared_expert", shared_intermediate=config.shared_expert_intermediate_size, shared_gate="mlp.shared_expert_gate"
    )  # fmt: skip
    return {"qkv_bias": config.qkv_bias, "windows": windows(config), "mixture": mixture}


def qwen3_moe(config: Any) -> dict[str, Any]:
    return {**qwen3(config), "windows": same_window(config), "mixture": qwen_experts(config)}


def qwen3_vl_moe(config: Any) -> dict[str, Any]:
    return {**qwen3_vl(config), "mixture": qwen_experts(config, normalised=True, stored="either")}


def qwen_experts(config: Any, **more: Any) -> MixtureConfig:
    return mixture_config(
        config, config.moe_intermediate_size, **{"layers": sparse_steps(config), "normalised": getattr(config, "norm_topk_prob", False), **more}
    )  # fmt: skip


def sparse_steps(config: Any) -> tuple[bool, ...]:
    """Layers with experts by `decoder_sparse_step` and `mlp_only_layers`."""
    step = config.decoder_sparse_step
    if not isinstance(step, int) or step < 1:
        raise ModelError(f"decoder_sparse_step={step!r}: every how many layers one has experts, so at least 1")
    dense = config.mlp_only_layers or ()
    return tuple(number not in dense and (number + 1) % step == 0 for number in range(config.num_hidden_layers))


def olmoe(config: Any) -> dict[str, Any]:
    if config.clip_qkv is not None:
        raise ModelError(f"the numba engine needs clip_qkv=None, not clip_qkv={config.clip_qkv!r}: use 'transformers'")
    biased = config.attention_bias
    mixture = mixture_config(config, config.intermediate_size, normalised=config.norm_topk_prob)
    return {"qkv_bias": biased, "output_bias": biased, "head_norms": True, "wide_head_norms": True, "mixture": mixture}


def glm4_moe(config: Any) -> dict[str, Any]:
    mixture = mixture_config(
        config, config.moe_intermediate_size, layers=sparse_after(config), wide_router=True, choice_bias="mlp.gate.e_score_correction_bias",
        scores="sigmoid", normalised=config.norm_topk_prob, floor=1e-20, scale=config.routed_scaling_factor, groups=config.n_group,
        chosen_groups=config.topk_group, shared_intermediate=config.moe_intermediate_size * config.n_shared_experts,
    )  # fmt: skip
    return {"qkv_bias": config.attention_bias, "head_norms": getattr(config, "use_qk_norm", False), "mixture": mixture}


def glm4v_moe(config: Any) -> dict[str, Any]:
    return {**glm4_moe(config), "mrope": mrope_sections(config, (8, 12, 12))}


def deepseek_v2(config: Any) -> dict[str, Any]:
    """Its routers are softmaxes; the rest is that of version 3."""
    limited = config.topk_method == "group_limited_greedy"
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        raise ModelError(
            f"the numba engine needs topk_method greedy or group_limited_greedy, not {config.topk_method!r}"
        )
    mixture = mixture_config(
        config, config.moe_intermediate_size, layers=sparse_after(config), wide_router=True, normalised=False,
        scale=config.routed_scaling_factor, groups=config.n_group if limited else 1, chosen_groups=config.topk_group if limited else 1,
        group_best=1, shared_intermediate=config.moe_intermediate_size * config.n_shared_experts, shared_bias=config.mlp_bias,
    )  # fmt: skip
    return {**latent(config), "mlp_bias": config.mlp_bias, "mixture": mixture}


def deepseek_v3(config: Any) -> dict[str, Any]:
    return {**glm4_moe(config), **latent(config), "head_norms": False}


def latent(config: Any) -> dict[str, Any]:
    latent = LatentConfig(
        config.q_lora_rank, config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    )  # fmt: skip
    width = latent.plain_dim + latent.rotated_dim
    rope = config.rope_parameters or {}
    # YaRN's correction of the temperature of attention.
    above = rope.get("mscale_all_dim", 0) if rope.get("rope_type", "default") != "default" else 0
    correction = 0.1 * above * math.log(rope["factor"]) + 1.0 if above and rope["factor"] > 1 else 1.0
    biased = config.attention_bias
    interleaved = getattr(config, "rope_interleave", True)
    return {
        "latent": latent,
        "kv_heads": config.num_attention_heads,
        "head_dim": max(width, latent.value_dim),
        "scale": width**-0.5 * correction * correction,
        "qkv_bias": biased,
        "output_bias": biased,
        "ropes": (read_rope(config, latent.rotated_dim, config.model_type, interleaved=interleaved),)
        * config.num_hidden_layers,
    }


def sparse_after(config: Any) -> tuple[bool, ...]:
    types = getattr(config, "mlp_layer_types", None) if config.model_type == "glm4_moe_lite" else None
    if types is not None:
        return tuple(kind == "sparse" for kind in types)
    return tuple(number >= config.first_k_dense_replace for number in range(config.num_hidden_layers))


def gpt_oss(config: Any) -> dict[str, Any]:
    mixture = mixture_config(
        config, config.intermediate_size, scores="softmax of chosen", router="mlp.router", router_bias=True, expert_bias=True,
        stored="transposed", clipped=ClippedGate(getattr(config, "swiglu_alpha", 1.702), getattr(config, "swiglu_limit", 7.0)),
    )  # fmt: skip
    biased = config.attention_bias
    return {"qkv_bias": biased, "output_bias": biased, "windows": windows(config), "sinks": True, "mixture": mixture}


def llama4(config: Any) -> dict[str, Any]:
    at, layers = "feed_forward", range(config.num_hidden_layers)
    rotated = [bool(used) for used in config.no_rope_layers]  # 1 means that the layer uses RoPE
    mixture = mixture_config(
        config, config.intermediate_size, layers=tuple(number in config.moe_layers for number in layers), scores="sigmoid",
        normalised=False, scaled_input=True, stored="transposed", router=f"{at}.router", shared=f"{at}.shared_expert",
        shared_intermediate=config.intermediate_size, stacked=(f"{at}.experts.gate_up_proj", f"{at}.experts.down_proj"),
    )  # fmt: skip
    blocks = AttentionBlocks(config.attention_chunk_size) if config.attention_chunk_size else None
    return {
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "intermediate": config.intermediate_size_mlp,
        "names": Names(gate=f"{at}.gate_proj", up=f"{at}.up_proj", down=f"{at}.down_proj"),
        "ropes": ropes_where(config, rotated, interleaved=True),
        "windows": tuple(blocks if kind == "chunked_attention" else None for kind in config.layer_types),
        "unit_heads": tuple(config.use_qk_norm and used for used in rotated),
        "query_scale": QueryScale(config.attn_scale, config.floor_scale, offset=1, rotary=False),
        "scaled_queries": tuple(bool(config.attn_temperature_tuning) and not used for used in rotated),
        "mixture": mixture,
    }


def qwen3_5(config: Any) -> dict[str, Any]:
    sections = mrope_sections(config, (11, 11, 10))
    return {**gated_delta_net(config, grouped=False), "mrope": sections, "interleaved_mrope": True}


def qwen3_5_moe(config: Any) -> dict[str, Any]:
    mixture = qwen3_next_experts(config, (True,) * config.num_hidden_layers, normalised=True)
    return {**qwen3_5(config), "intermediate": config.moe_intermediate_size, "mixture": mixture}


def qwen3_next(config: Any) -> dict[str, Any]:
    mixture = qwen3_next_experts(config, sparse_steps(config), normalised=config.norm_topk_prob)
    return {**gated_delta_net(config, grouped=True), "mixture": mixture}


def gated_delta_net(config: Any, grouped: bool) -> dict[str, Any]:
    if config.hidden_act not in ("silu", "swish"):
        raise ModelError(
            f"the numba engine needs hidden_act=silu in the convolution of linear attention, not {config.hidden_act!r}: use 'transformers'"
        )
    biased = config.attention_bias
    net = DeltaNetConfig(
        tuple(kind == "linear_attention" for kind in config.layer_types), config.linear_num_value_heads, config.linear_num_key_heads,
        config.linear_key_head_dim, config.linear_value_head_dim, config.linear_conv_kernel_dim, grouped,
    )  # fmt: skip
    return {
        "qkv_bias": biased,
        "output_bias": biased,
        "head_norms": True,
        "norm_offset": 1.0,
        "gated_attention": True,
        "delta_net": net,
    }


def qwen3_next_experts(config: Any, layers: tuple[bool, ...], normalised: bool) -> MixtureConfig:
    at = "mlp.shared_expert"
    return MixtureConfig(
        layers, config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, normalised=normalised, shared=at,
        shared_intermediate=config.shared_expert_intermediate_size, shared_gate=f"{at}_gate",
    )  # fmt: skip


def mixture_config(config: Any, intermediate: int, **more: Any) -> MixtureConfig:
    count = getattr(config, "num_local_experts", None) or config.num_experts
    layers = more.pop("layers", (True,) * config.num_hidden_layers)
    return MixtureConfig(layers, count, config.num_experts_per_tok, intermediate, **more)
