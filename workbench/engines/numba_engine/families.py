"""One `Architecture` for every model family that this engine runs; everything specific to a family is in this file."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import transformers
from range_kernels.experts import ClippedGate

from ...errors import ModelError
from ...models import Model
from .architectures import (
    Architecture,
    AttentionBlocks,
    DecoderConfig,
    DeltaNetConfig,
    LatentConfig,
    MixtureConfig,
    Names,
    QueryScale,
    Window,
    read_settings,
)
from .rope import Rope, read_rope


def read_decoder_config(model: Model) -> DecoderConfig:
    """Read the decoder settings of a model.

    Raises:
        ModelError: a family or a setting that this engine does not support.
    """
    config, name = model.text_config, model.name
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"the numba engine runs {', '.join(sorted(ARCHITECTURES))}; {name!r} is {config.model_type!r}: use 'transformers'"
        )
    settings = read_settings(config, ARCHITECTURES[config.model_type], name)
    if config is model.config:
        return settings
    # A multimodal class has a head of its own, and few apply what its language part's class does after the head.
    scale, cap = settings.logit_scale, settings.final_softcap
    if scale != 1.0 and not any(_class_reads(model, each) for each in ("logit_scale", "logits_scaling")):
        scale = 1.0
    if cap and not _class_reads(model, "final_logit_softcapping"):
        cap = 0.0
    return replace(settings, logit_scale=scale, final_softcap=cap)


def _class_reads(model: Model, setting: str) -> bool:
    """Whether the model's class in Transformers reads a setting, by its source; the sweep compares its logits."""
    names = getattr(model.config, "architectures", None) or [""]
    found = getattr(transformers, names[0], None)
    if found is None:
        raise ModelError(
            f"the numba engine cannot tell whether {names[0]!r}, the class of {model.name!r}, reads {setting}: Transformers "
            f"{transformers.__version__} lacks it; use 'transformers'"
        )
    return setting in inspect.getsource(found)


def _llama(config: Any) -> dict[str, Any]:
    biased = config.attention_bias
    return {"qkv_bias": biased, "output_bias": biased, "mlp_bias": config.mlp_bias}


def _internlm2(config: Any) -> dict[str, Any]:
    names = Names(
        attention_norm="attention_norm", mlp_norm="ffn_norm", qkv="attention.wqkv", output="attention.wo",
        gate="feed_forward.w1", up="feed_forward.w3", down="feed_forward.w2", table="tok_embeddings", head="output",
    )  # fmt: skip
    return {"qkv": "internlm2", "qkv_bias": config.bias, "output_bias": config.bias, "names": names}


def _windows(config: Any) -> tuple[Window, ...]:
    """Windows by `layer_types`; without that setting, the same window in all layers."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _same_window(config: Any) -> tuple[Window, ...]:
    """The window of classes that ignore `layer_types`."""
    return (getattr(config, "sliding_window", None),) * config.num_hidden_layers


def _mistral(config: Any) -> dict[str, Any]:
    return {"windows": _same_window(config)}


def _ministral(config: Any) -> dict[str, Any]:
    return {"windows": _windows(config)}


def _qwen2(config: Any) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _windows(config)}


def _qwen2_vl(config: Any) -> dict[str, Any]:
    return {**_qwen2(config), "mrope": tuple((config.rope_parameters or {}).get("mrope_section") or (16, 24, 24))}


def _qwen3(config: Any) -> dict[str, Any]:
    biased = config.attention_bias
    return {"qkv_bias": biased, "output_bias": biased, "head_norms": True, "windows": _windows(config)}


def _qwen3_vl(config: Any) -> dict[str, Any]:
    sections = tuple((config.rope_parameters or {}).get("mrope_section") or (24, 20, 20))
    full = (None,) * config.num_hidden_layers
    return {**_qwen3(config), "windows": full, "mrope": sections, "interleaved_mrope": True, "deepstack": True}


def _phi3(config: Any) -> dict[str, Any]:
    return {"qkv": "fused", "fused_gate_up": True, "windows": _same_window(config)}


def _gemma(config: Any) -> dict[str, Any]:
    biased = config.attention_bias
    return {"qkv_bias": biased, "output_bias": biased, "norm_offset": 1.0}


def _gemma2(config: Any) -> dict[str, Any]:
    names = Names(
        after_attention="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm", after_mlp="post_feedforward_layernorm"
    )  # fmt: skip
    return {
        **_gemma(config),
        "names": names,
        "windows": _windows(config),
        "scale": config.query_pre_attn_scalar**-0.5,
        "softcap": config.attn_logit_softcapping or 0.0,
        "final_softcap": config.final_logit_softcapping or 0.0,
    }


def _gemma3(config: Any) -> dict[str, Any]:
    return {
        **_gemma2(config),
        "softcap": 0.0,  # Transformers never applies attn_logit_softcapping here
        "head_norms": True,
        "ropes": _ropes_by_kind(config),
    }


def _glm(config: Any) -> dict[str, Any]:
    return {"qkv_bias": getattr(config, "attention_bias", False), "fused_gate_up": True}


def _glm4(config: Any) -> dict[str, Any]:
    names = Names(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
    return {**_glm(config), "names": names}


def _glm4v(config: Any) -> dict[str, Any]:
    return {**_glm_ocr(config), "qkv_bias": True}


def _glm_ocr(config: Any) -> dict[str, Any]:
    return {**_glm4(config), "mrope": _glm_sections(config)}


def _glm4v_moe(config: Any) -> dict[str, Any]:
    return {**_glm4_moe(config), "mrope": _glm_sections(config)}


def _glm_sections(config: Any) -> tuple[int, ...]:
    return tuple((config.rope_parameters or {}).get("mrope_section") or (8, 12, 12))


def _smollm3(config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = read_rope(config, head_dim, "smollm3")
    ropes = tuple(rope if used else None for used in config.no_rope_layers)  # 1 means that the layer uses RoPE
    return {**_llama(config), "windows": _windows(config), "ropes": ropes}


# Norms after attention and MLP, none before them.
_AFTER_ONLY = Names(
    attention_norm=None, after_attention="post_attention_layernorm", mlp_norm=None, after_mlp="post_feedforward_layernorm"
)  # fmt: skip


def _olmo2(config: Any) -> dict[str, Any]:
    biased = config.attention_bias
    return {
        "qkv_bias": biased,
        "output_bias": biased,
        "head_norms": True,
        "wide_head_norms": True,
        "names": _AFTER_ONLY,
    }


def _olmo3(config: Any) -> dict[str, Any]:
    return {**_olmo2(config), "windows": _windows(config), "ropes": _ropes_by_kind(config)}


def _exaone4(config: Any) -> dict[str, Any]:
    hybrid = config.sliding_window is not None
    types = config.layer_types if hybrid else ["full_attention"] * config.num_hidden_layers
    ropes = _ropes_where(config, [not hybrid or kind == "sliding_attention" for kind in types])
    return {
        "head_norms": True,
        "names": _AFTER_ONLY,
        "windows": _windows(config) if hybrid else (None,) * len(types),
        "ropes": ropes,
    }


def _granite(config: Any) -> dict[str, Any]:
    biased = config.attention_bias
    if not config.logits_scaling:
        raise ModelError(
            f"logits_scaling={config.logits_scaling!r}: logits are divided by it, so it must be another number than 0"
        )
    return {
        "qkv_bias": biased,
        "output_bias": biased,
        "mlp_bias": getattr(config, "mlp_bias", False),
        "scale": config.attention_multiplier,
        "input_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1 / config.logits_scaling,
    }


def _granite_moe(config: Any) -> dict[str, Any]:
    stacked = ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")
    mixture = _mixture(
        config, config.intermediate_size, scores="softmax of chosen", stacked=stacked, router="block_sparse_moe.router.layer"
    )  # fmt: skip
    return {**_granite(config), "mixture": mixture}


def _cohere(config: Any) -> dict[str, Any]:
    if getattr(config, "use_qk_norm", False):
        raise ModelError("the numba engine needs use_qk_norm=False for Cohere models: use 'transformers'")
    biased = config.attention_bias
    return {
        "qkv_bias": biased,
        "output_bias": biased,
        "layer_norms": True,
        "parallel": True,
        "logit_scale": config.logit_scale,
        "names": Names(mlp_norm=None),
    }


def _cohere2(config: Any) -> dict[str, Any]:
    ropes = _ropes_where(config, [kind == "sliding_attention" for kind in config.layer_types], interleaved=True)
    return {**_cohere(config), "windows": _windows(config), "ropes": ropes}


def _ministral3(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    missing = [each for each in ("llama_4_scaling_beta", "original_max_position_embeddings") if rope.get(each) is None]
    if missing:
        raise ModelError(
            f"the numba engine needs {missing[0]} in the rope_parameters of Ministral 3: add it to config.json"
        )
    scale = QueryScale(rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])
    layers = config.num_hidden_layers
    return {"windows": _same_window(config), "query_scale": scale, "scaled_queries": (True,) * layers}


def _ernie(config: Any) -> dict[str, Any]:
    return {"qkv_bias": config.use_bias, "output_bias": config.use_bias, "mlp_bias": config.use_bias}


def _ernie_moe(config: Any) -> dict[str, Any]:
    layers = tuple(
        (number + 1) % config.moe_layer_interval == 0
        and config.moe_layer_start_index <= number <= config.moe_layer_end_index
        for number in range(config.num_hidden_layers)
    )
    mixture = _mixture(
        config, config.moe_intermediate_size, layers=layers, wide_router=True, choice_bias="mlp.moe_statics.e_score_correction_bias",
        floor=config.moe_norm_min, floor_added=False, shared_intermediate=config.moe_intermediate_size * config.moe_num_shared_experts,
        shared_bias=config.use_bias,
    )  # fmt: skip
    return {**_ernie(config), "mixture": mixture}


def _seed_oss(config: Any) -> dict[str, Any]:
    return {"qkv_bias": config.attention_bias, "output_bias": config.attention_out_bias, "mlp_bias": config.mlp_bias}


def _helium(config: Any) -> dict[str, Any]:
    return {"qkv_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def _mixtral(config: Any) -> dict[str, Any]:
    return {"windows": _same_window(config), "mixture": _mixtral_experts(config)}


def _minimax_m2(config: Any) -> dict[str, Any]:
    mixture = _mixtral_experts(config, scores="sigmoid", choice_bias="block_sparse_moe.e_score_correction_bias")
    return {"head_norms": True, "wide_head_norms": True, "mixture": mixture}


def _mixtral_experts(config: Any, **more: Any) -> MixtureConfig:
    at = "block_sparse_moe"
    return _mixture(
        config, config.intermediate_size, router=f"{at}.gate", experts=f"{at}.experts", parts=("w1", "w3", "w2"), **more
    )  # fmt: skip


def _qwen2_moe(config: Any) -> dict[str, Any]:
    mixture = _qwen_experts(
        config, shared="mlp.shared_expert", shared_intermediate=config.shared_expert_intermediate_size, shared_gate="mlp.shared_expert_gate"
    )  # fmt: skip
    return {"qkv_bias": config.qkv_bias, "windows": _windows(config), "mixture": mixture}


def _qwen3_moe(config: Any) -> dict[str, Any]:
    return {**_qwen3(config), "windows": _same_window(config), "mixture": _qwen_experts(config)}


def _qwen3_vl_moe(config: Any) -> dict[str, Any]:
    return {**_qwen3_vl(config), "mixture": _qwen_experts(config, normalised=True, stored="either")}


def _qwen_experts(config: Any, **more: Any) -> MixtureConfig:
    return _mixture(
        config, config.moe_intermediate_size, **{"layers": _sparse_steps(config), "normalised": getattr(config, "norm_topk_prob", False), **more}
    )  # fmt: skip


def _sparse_steps(config: Any) -> tuple[bool, ...]:
    """Layers with experts by `decoder_sparse_step` and `mlp_only_layers`."""
    step = config.decoder_sparse_step
    if not isinstance(step, int) or step < 1:
        raise ModelError(f"decoder_sparse_step={step!r}: every how many layers one has experts, so at least 1")
    dense = config.mlp_only_layers or ()
    return tuple(number not in dense and (number + 1) % step == 0 for number in range(config.num_hidden_layers))


def _olmoe(config: Any) -> dict[str, Any]:
    if config.clip_qkv is not None:
        raise ModelError(f"the numba engine needs clip_qkv=None, not clip_qkv={config.clip_qkv!r}: use 'transformers'")
    biased = config.attention_bias
    mixture = _mixture(config, config.intermediate_size, normalised=config.norm_topk_prob)
    return {"qkv_bias": biased, "output_bias": biased, "head_norms": True, "wide_head_norms": True, "mixture": mixture}


def _glm4_moe(config: Any) -> dict[str, Any]:
    mixture = _mixture(
        config, config.moe_intermediate_size, layers=_sparse_after(config), wide_router=True, choice_bias="mlp.gate.e_score_correction_bias",
        scores="sigmoid", normalised=config.norm_topk_prob, floor=1e-20, scale=config.routed_scaling_factor, groups=config.n_group,
        chosen_groups=config.topk_group, shared_intermediate=config.moe_intermediate_size * config.n_shared_experts,
    )  # fmt: skip
    return {"qkv_bias": config.attention_bias, "head_norms": getattr(config, "use_qk_norm", False), "mixture": mixture}


def _deepseek_v2(config: Any) -> dict[str, Any]:
    """Its routers are softmaxes; the rest is that of version 3."""
    limited = config.topk_method == "group_limited_greedy"
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        raise ModelError(
            f"the numba engine needs topk_method greedy or group_limited_greedy, not {config.topk_method!r}"
        )
    mixture = _mixture(
        config, config.moe_intermediate_size, layers=_sparse_after(config), wide_router=True, normalised=False,
        scale=config.routed_scaling_factor, groups=config.n_group if limited else 1, chosen_groups=config.topk_group if limited else 1,
        group_best=1, shared_intermediate=config.moe_intermediate_size * config.n_shared_experts, shared_bias=config.mlp_bias,
    )  # fmt: skip
    return {**_latent(config), "mlp_bias": config.mlp_bias, "mixture": mixture}


def _deepseek_v3(config: Any) -> dict[str, Any]:
    return {**_glm4_moe(config), **_latent(config), "head_norms": False}


def _latent(config: Any) -> dict[str, Any]:
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


def _sparse_after(config: Any) -> tuple[bool, ...]:
    types = getattr(config, "mlp_layer_types", None) if config.model_type == "glm4_moe_lite" else None
    if types is not None:
        return tuple(kind == "sparse" for kind in types)
    return tuple(number >= config.first_k_dense_replace for number in range(config.num_hidden_layers))


def _gpt_oss(config: Any) -> dict[str, Any]:
    mixture = _mixture(
        config, config.intermediate_size, scores="softmax of chosen", router="mlp.router", router_bias=True, expert_bias=True,
        stored="transposed", clipped=ClippedGate(getattr(config, "swiglu_alpha", 1.702), getattr(config, "swiglu_limit", 7.0)),
    )  # fmt: skip
    biased = config.attention_bias
    return {"qkv_bias": biased, "output_bias": biased, "windows": _windows(config), "sinks": True, "mixture": mixture}


def _llama4(config: Any) -> dict[str, Any]:
    at, layers = "feed_forward", range(config.num_hidden_layers)
    rotated = [bool(used) for used in config.no_rope_layers]  # 1 means that the layer uses RoPE
    mixture = _mixture(
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
        "ropes": _ropes_where(config, rotated, interleaved=True),
        "windows": tuple(blocks if kind == "chunked_attention" else None for kind in config.layer_types),
        "unit_heads": tuple(config.use_qk_norm and used for used in rotated),
        "query_scale": QueryScale(config.attn_scale, config.floor_scale, offset=1, rotary=False),
        "scaled_queries": tuple(bool(config.attn_temperature_tuning) and not used for used in rotated),
        "mixture": mixture,
    }


def _qwen3_5(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters or {}
    return {
        **_gated_delta_net(config, grouped=False),
        "mrope": tuple(rope.get("mrope_section") or (11, 11, 10)),
        "interleaved_mrope": True,
    }


def _qwen3_5_moe(config: Any) -> dict[str, Any]:
    mixture = _qwen3_next_experts(config, (True,) * config.num_hidden_layers, normalised=True)
    return {**_qwen3_5(config), "intermediate": config.moe_intermediate_size, "mixture": mixture}


def _qwen3_next(config: Any) -> dict[str, Any]:
    mixture = _qwen3_next_experts(config, _sparse_steps(config), normalised=config.norm_topk_prob)
    return {**_gated_delta_net(config, grouped=True), "mixture": mixture}


def _gated_delta_net(config: Any, grouped: bool) -> dict[str, Any]:
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


def _qwen3_next_experts(config: Any, layers: tuple[bool, ...], normalised: bool) -> MixtureConfig:
    at = "mlp.shared_expert"
    return MixtureConfig(
        layers, config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, normalised=normalised, shared=at,
        shared_intermediate=config.shared_expert_intermediate_size, shared_gate=f"{at}_gate",
    )  # fmt: skip


def _mixture(config: Any, intermediate: int, **more: Any) -> MixtureConfig:
    count = getattr(config, "num_local_experts", None) or config.num_experts
    layers = more.pop("layers", (True,) * config.num_hidden_layers)
    return MixtureConfig(layers, count, config.num_experts_per_tok, intermediate, **more)


def _ropes_by_kind(config: Any) -> tuple[Rope, ...]:
    """The rotary embedding of each layer, of which each kind of layer has its own."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ropes = {kind: read_rope(config, head_dim, config.model_type, layer_type=kind) for kind in set(config.layer_types)}
    return tuple(ropes[kind] for kind in config.layer_types)


def _ropes_where(config: Any, used: list[bool], interleaved: bool = False) -> tuple[Rope | None, ...]:
    """The rotary embedding of the layers that use it."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = read_rope(config, head_dim, config.model_type, interleaved=interleaved)
    return tuple(rope if each else None for each in used)


_WINDOW = frozenset({"sliding_window"})
_LINEAR = frozenset({"linear_num_value_heads"})
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama),
    "mistral": Architecture(_mistral, own=_WINDOW),
    "qwen2": Architecture(_qwen2, own=_WINDOW),
    "qwen2_vl_text": Architecture(_qwen2_vl, own=_WINDOW),
    "qwen2_5_vl_text": Architecture(_qwen2_vl, own=_WINDOW),
    "qwen3": Architecture(_qwen3, own=_WINDOW),
    "qwen3_vl_text": Architecture(_qwen3_vl),
    "internlm2": Architecture(_internlm2),
    "internlm3": Architecture(_llama),
    "phi3": Architecture(_phi3, partial=True, own=_WINDOW),
    "gemma": Architecture(_gemma),
    "gemma2": Architecture(_gemma2, "hidden_activation", own=_WINDOW),
    "gemma3_text": Architecture(_gemma3, "hidden_activation", own=_WINDOW),
    "glm": Architecture(_glm, partial=True, interleaved=True),
    "glm4": Architecture(_glm4, partial=True, interleaved=True),
    "glm4v_text": Architecture(_glm4v, partial=True, interleaved=True),
    "glm_ocr_text": Architecture(_glm_ocr, partial=True, interleaved=True),
    "glm4v_moe_text": Architecture(_glm4v_moe, partial=True),
    "smollm3": Architecture(_smollm3, own=_WINDOW),
    "olmo2": Architecture(_olmo2),
    "olmo3": Architecture(_olmo3, own=_WINDOW),
    "exaone4": Architecture(_exaone4, own=_WINDOW),
    "granite": Architecture(_granite),
    "granitemoe": Architecture(_granite_moe),
    "cohere": Architecture(_cohere, epsilon="layer_norm_eps", interleaved=True),
    "cohere2": Architecture(_cohere2, epsilon="layer_norm_eps", own=_WINDOW),
    "ministral": Architecture(_ministral, own=_WINDOW),
    "ministral3": Architecture(_ministral3, own=_WINDOW),
    "ernie4_5": Architecture(_ernie, interleaved=True),
    "ernie4_5_moe": Architecture(_ernie_moe, interleaved=True),
    "seed_oss": Architecture(_seed_oss),
    "helium": Architecture(_helium, interleaved=True),
    "mixtral": Architecture(_mixtral, own=_WINDOW),
    "minimax_m2": Architecture(_minimax_m2, partial=True),
    "qwen2_moe": Architecture(_qwen2_moe, own=_WINDOW),
    "qwen3_moe": Architecture(_qwen3_moe, own=_WINDOW),
    "qwen3_vl_moe_text": Architecture(_qwen3_vl_moe),
    "olmoe": Architecture(_olmoe),
    "glm4_moe": Architecture(_glm4_moe, partial=True),
    "deepseek_v2": Architecture(_deepseek_v2),
    "deepseek_v3": Architecture(_deepseek_v3),
    "glm4_moe_lite": Architecture(_deepseek_v3),
    "gpt_oss": Architecture(_gpt_oss, own=_WINDOW),
    "qwen3_5_text": Architecture(_qwen3_5, partial=True, own=_LINEAR),
    "qwen3_5_moe_text": Architecture(_qwen3_5_moe, partial=True, own=_LINEAR),
    "qwen3_next": Architecture(_qwen3_next, partial=True, own=_LINEAR),
    "llama4_text": Architecture(_llama4, own=frozenset({"attention_chunk_size"})),
}
