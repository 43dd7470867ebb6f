"""How families with an MLP in every layer differ from a Llama without biases: `DecoderConfig` fields from their configurations."""

from __future__ import annotations

from typing import Any

from ...errors import ModelError
from .architectures import Names, QueryScale
from .layer_settings import mrope_sections, ropes_by_kind, ropes_where, same_window, windows


def llama(config: Any) -> dict[str, Any]:
    biased = config.attention_bias
    return {"qkv_bias": biased, "output_bias": biased, "mlp_bias": config.mlp_bias}


def internlm2(config: Any) -> dict[str, Any]:
    names = Names(
        attention_norm="attention_norm", mlp_norm="ffn_norm", qkv="attention.wqkv", output="attention.wo",
        gate="feed_forward.w1", up="feed_forward.w3", down="feed_forward.w2", table="tok_embeddings", head="output",
    )  # fmt: skip
    return {"qkv": "internlm2", "qkv_bias": config.bias, "output_bias": config.bias, "names": names}


def mistral(config: Any) -> dict[str, Any]:
    return {"windows": same_window(config)}


def ministral(config: Any) -> dict[str, Any]:
    return {"windows": windows(config)}


def qwen2(config: Any) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": windows(config)}


def qwen2_vl(config: Any) -> dict[str, Any]:
    return {**qwen2(config), "mrope": mrope_sections(config, (16, 24, 24))}


def qwen3(config: Any) -> dict[str, Any]:
    biased = config.attention_bias
    return {"qkv_bias": biased, "output_bias": biased, "head_norms": True, "windows": windows(config)}


def qwen3_vl(config: Any) -> dict[str, Any]:
    full = (None,) * config.num_hidden_layers
    sections = mrope_sections(config, (24, 20, 20))
    return {**qwen3(config), "windows": full, "mrope": sections, "interleaved_mrope": True, "deepstack": True}


def phi3(config: Any) -> dict[str, Any]:
    return {"qkv": "fused", "fused_gate_up": True, "windows": same_window(config)}


def gemma(config: Any) -> dict[str, Any]:
    biased = config.attention_bias
    return {"qkv_bias": biased, "output_bias": biased, "norm_offset": 1.0}


def gemma2(config: Any) -> dict[str, Any]:
    names = Names(
        after_attention="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm", after_mlp="post_feedforward_layernorm"
    )  # fmt: skip
    return {
        **gemma(config),
        "names": names,
        "windows": windows(config),
        "scale": config.query_pre_attn_scalar**-0.5,
        "softcap": config.attn_logit_softcapping or 0.0,
        "final_softcap": config.final_logit_softcapping or 0.0,
    }


def gemma3(config: Any) -> dict[str, Any]:
    return {
        **gemma2(config),
        "softcap": 0.0,  # Transformers never applies attn_logit_softcapping here
        "head_norms": True,
        "ropes": ropes_by_kind(config),
    }


def glm(config: Any) -> dict[str, Any]:
    return {"qkv_bias": getattr(config, "attention_bias", False), "fused_gate_up": True}


def glm4(config: Any) -> dict[str, Any]:
    names = Names(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
    return {**glm(config), "names": names}


def glm4v(config: Any) -> dict[str, Any]:
    return {**glm_ocr(config), "qkv_bias": True}


def glm_ocr(config: Any) -> dict[str, Any]:
    return {**glm4(config), "mrope": mrope_sections(config, (8, 12, 12))}


def smollm3(config: Any) -> dict[str, Any]:
    ropes = ropes_where(config, config.no_rope_layers)  # 1 means that the layer uses RoPE
    return {**llama(config), "windows": windows(config), "ropes": ropes}


# Norms after attention and MLP, none before them.
_AFTER_ONLY = Names(
    attention_norm=None, after_attention="post_attention_layernorm", mlp_norm=None, after_mlp="post_feedforward_layernorm"
)  # fmt: skip


def olmo2(config: Any) -> dict[str, Any]:
    biased = config.attention_bias
    return {
        "qkv_bias": biased,
        "output_bias": biased,
        "head_norms": True,
        "wide_head_norms": True,
        "names": _AFTER_ONLY,
    }


def olmo3(config: Any) -> dict[str, Any]:
    return {**olmo2(config), "windows": windows(config), "ropes": ropes_by_kind(config)}


def exaone4(config: Any) -> dict[str, Any]:
    hybrid = config.sliding_window is not None
    types = config.layer_types if hybrid else ["full_attention"] * config.num_hidden_layers
    ropes = ropes_where(config, [not hybrid or kind == "sliding_attention" for kind in types])
    return {
        "head_norms": True,
        "names": _AFTER_ONLY,
        "windows": windows(config) if hybrid else (None,) * len(types),
        "ropes": ropes,
    }


def granite(config: Any) -> dict[str, Any]:
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


def cohere(config: Any) -> dict[str, Any]:
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


def cohere2(config: Any) -> dict[str, Any]:
    ropes = ropes_where(config, [kind == "sliding_attention" for kind in config.layer_types], interleaved=True)
    return {**cohere(config), "windows": windows(config), "ropes": ropes}


def ministral3(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    missing = [each for each in ("llama_4_scaling_beta", "original_max_position_embeddings") if rope.get(each) is None]
    if missing:
        raise ModelError(
            f"the numba engine needs {missing[0]} in the rope_parameters of Ministral 3: add it to config.json"
        )
    scale = QueryScale(rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])
    layers = config.num_hidden_layers
    return {"windows": same_window(config), "query_scale": scale, "scaled_queries": (True,) * layers}


def ernie(config: Any) -> dict[str, Any]:
    return {"qkv_bias": config.use_bias, "output_bias": config.use_bias, "mlp_bias": config.use_bias}


def seed_oss(config: Any) -> dict[str, Any]:
    return {"qkv_bias": config.attention_bias, "output_bias": config.attention_out_bias, "mlp_bias": config.mlp_bias}


def helium(config: Any) -> dict[str, Any]:
    return {"qkv_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
