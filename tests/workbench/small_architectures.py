"""Small random models of every family that the Numba engine runs, saved in Transformers' format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import workbench
from tests.workbench.small_models import BASE

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
HEADS = {"num_attention_heads": 4, "head_dim": 16}
THREE_LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GLM_ROPE = {**MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DELTA_NET: dict[str, Any] = {
    **HEADS, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 20,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.7,
}  # fmt: skip
GRANITE = {
    "embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "attention_bias": True
}  # fmt: skip
_GEMMA3 = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, "sliding_window": 9, **HEADS}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    """RoPE settings."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


# name: (configuration class, settings in addition to BASE)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, yarn": ("LlamaConfig", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama, yarn mscale": (
        "LlamaConfig",
        rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.1, truncate=False),
    ),
    "llama, dynamic within its context": ("LlamaConfig", rope("dynamic", factor=2.0)),
    "llama, dynamic beyond": ("LlamaConfig", {**rope("dynamic", factor=4.0), "max_position_embeddings": 32}),
    "llama, proportional": ("LlamaConfig", rope("proportional", partial_rotary_factor=0.5)),
    "mistral, window": ("MistralConfig", {"sliding_window": 11, **HEADS}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2, some windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1}),
    "qwen2-vl": ("Qwen2VLTextConfig", {"num_attention_heads": 3, "num_key_value_heads": 1, "rope_parameters": MROPE}),
    "qwen2.5-vl": (
        "Qwen2_5_VLTextConfig",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "rope_parameters": MROPE},
    ),
    "qwen3": ("Qwen3Config", HEADS),
    "qwen3-vl": ("Qwen3VLTextConfig", {**HEADS, "rope_parameters": MROPE}),
    "internlm3": ("InternLM3Config", {"qkv_bias": True, "bias": True, **HEADS}),
    "phi3": ("Phi3Config", {"sliding_window": 17, "pad_token_id": 0}),
    "phi3, short": (
        "Phi3Config",
        {**rope("longrope", **LONG), "original_max_position_embeddings": 128, "pad_token_id": 0},
    ),
    "phi3, long": (
        "Phi3Config",
        {**rope("longrope", **LONG), "original_max_position_embeddings": 32, "pad_token_id": 0},
    ),
    "phi3, partial": ("Phi3Config", {"partial_rotary_factor": 0.5, "pad_token_id": 0}),
    "gemma": ("GemmaConfig", {"hidden_act": "gelu_pytorch_tanh", "attention_bias": True, **HEADS}),
    "gemma2": (
        "Gemma2Config",
        {**_GEMMA3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_GEMMA3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "glm": ("GlmConfig", {**HEADS, "pad_token_id": 0, "attention_bias": True}),
    "glm4": ("Glm4Config", {**HEADS, "pad_token_id": 0, "attention_bias": True}),
    "glm4.1v": (
        "Glm4vTextConfig",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "pad_token_id": 0, "rope_parameters": GLM_ROPE},
    ),
    "glm-ocr": ("GlmOcrTextConfig", {**HEADS, "pad_token_id": 0, "rope_parameters": GLM_ROPE}),
    "glm4.5v": (
        "Glm4vMoeTextConfig",
        {
            **HEADS,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.7,
            "attention_bias": True,
            "rope_parameters": GLM_ROPE,
        },
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
    "olmo2": ("Olmo2Config", {"attention_bias": True}),
    "olmo3": ("Olmo3Config", {"sliding_window": 9, **THREE_LAYERS}),
    "olmo3, yarn": (
        "Olmo3Config",
        {
            "sliding_window": 9,
            **THREE_LAYERS,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "rope_theta": 1e4,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "exaone4": ("Exaone4Config", {"sliding_window": 9, **THREE_LAYERS, **HEADS}),
    "exaone4, no windows": ("Exaone4Config", {"sliding_window": None, "layer_types": ["full_attention"] * 3, **HEADS}),
    "granite": ("GraniteConfig", GRANITE),
    "cohere": ("CohereConfig", {"logit_scale": 0.5, "layer_norm_eps": 1e-3}),
    "cohere2": ("Cohere2Config", {"sliding_window": 9, **THREE_LAYERS, **HEADS}),
    "ministral": ("MinistralConfig", {"sliding_window": 9, **THREE_LAYERS, **HEADS}),
    "ministral3": (
        "Ministral3Config",
        {
            **HEADS,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=8,
                llama_4_scaling_beta=0.3,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        },
    ),
    "ernie4.5": ("Ernie4_5Config", {"use_bias": True, **HEADS}),
    "seed-oss": ("SeedOssConfig", {"attention_out_bias": True, **HEADS}),
    "helium": ("HeliumConfig", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "sliding_window": 11}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2, "num_hidden_layers": 4},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**EXPERTS, **HEADS, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3-vl-moe": ("Qwen3VLMoeTextConfig", {**EXPERTS, **HEADS, "rope_parameters": MROPE}),
    "olmoe": ("OlmoeConfig", {"num_experts": 6, "num_experts_per_tok": 3}),
    "glm4-moe": (
        "Glm4MoeConfig",
        {
            **HEADS,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "use_qk_norm": True,
            "routed_scaling_factor": 1.7,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
        },
    ),
    "ernie4.5-moe": (
        "Ernie4_5_MoeConfig",
        {
            **HEADS,
            "moe_intermediate_size": 24,
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_layer_end_index": 2,
        },
    ),
    "granite-moe": ("GraniteMoeConfig", {**GRANITE, "num_local_experts": 5}),
    "minimax-m2": (
        "MiniMaxM2Config",
        {**HEADS, "num_local_experts": 6, "num_experts_per_tok": 3, "partial_rotary_factor": 0.5},
    ),
    "deepseek-v2": (
        "DeepseekV2Config",
        {
            **LATENT,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "attention_bias": True,
        },
    ),
    "deepseek-v2, plain queries": (
        "DeepseekV2Config",
        {**LATENT, "q_lora_rank": None, "n_group": None, "topk_group": None},
    ),
    "deepseek-v3": ("DeepseekV3Config", {**LATENT, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}),
    "deepseek-v3, yarn": (
        "DeepseekV3Config",
        {
            **LATENT,
            "n_group": 1,
            "topk_group": 1,
            "rope_interleave": False,
            **rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0),
        },
    ),
    "glm4-moe-lite": (
        "Glm4MoeLiteConfig",
        {**LATENT, "v_head_dim": 24, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            **HEADS,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 9,
            **THREE_LAYERS,
            **rope("yarn", factor=4.0, original_max_position_embeddings=64, truncate=False),
            "swiglu_limit": 0.5,
        },
    ),
    "qwen3.5": (
        "Qwen3_5TextConfig",
        {**DELTA_NET, "rope_parameters": {**MROPE, "mrope_section": [1, 2, 1], "partial_rotary_factor": 0.5}},
    ),
    "qwen3.5-moe": (
        "Qwen3_5MoeTextConfig",
        {
            **DELTA_NET,
            **EXPERTS,
            "shared_expert_intermediate_size": 40,
            "rope_parameters": {**MROPE, "mrope_section": [1, 2, 1], "partial_rotary_factor": 0.5},
        },
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            **DELTA_NET,
            **EXPERTS,
            "shared_expert_intermediate_size": 40,
            "partial_rotary_factor": 0.5,
            "mlp_only_layers": [2],
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            **HEADS,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "intermediate_size_mlp": 72,
            "moe_layers": [0, 2],
            "no_rope_layers": [1, 0, 1],
            "attention_chunk_size": 12,
            "floor_scale": 7,
        },
    ),
    "smollm3, windows": (
        "SmolLM3Config",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 9, "pad_token_id": 0},
    ),
}
# Families whose layers are those of another one with other settings: what depends on the layers only is tested with the others.
REPEATED = frozenset((
    "olmo3", "olmo3, yarn", "exaone4, no windows", "granite-moe", "ministral", "cohere", "ernie4.5", "ernie4.5-moe", "seed-oss", "helium",
    "mixtral", "qwen2-moe", "olmoe", "minimax-m2", "qwen3.5-moe", "qwen3-vl-moe", "glm4.5v", "glm-ocr", "glm4.1v", "deepseek-v2",
    "deepseek-v2, plain queries", "deepseek-v3, yarn", "glm4-moe-lite",
))  # fmt: skip
DISTINCT = [name for name in FAMILIES if name not in REPEATED]
WITH_IMAGES = {
    "qwen2-vl": "Qwen2VL", "qwen2.5-vl": "Qwen2_5_VL", "qwen3-vl": "Qwen3VL", "qwen3-vl-moe": "Qwen3VLMoe", "qwen3.5": "Qwen3_5",
    "qwen3.5-moe": "Qwen3_5Moe", "glm4.1v": "Glm4v", "glm-ocr": "GlmOcr", "glm4.5v": "Glm4vMoe",
}  # fmt: skip
_VISION = {"depth": 1, "hidden_size": 16, "embed_dim": 16, "num_heads": 2, "intermediate_size": 16, "patch_size": 4}
_WIDTH = {"Qwen2VL": "hidden_size"}


def save(name: str, folder: Path, **more: Any) -> workbench.Model:
    """Save and load a random model of a family; norms and biases are random, too."""
    config_class, changes = FAMILIES[name]
    config = getattr(transformers, config_class)(**{**BASE, **changes, **more})
    torch.manual_seed(0)
    if name in WITH_IMAGES:
        prefix = WITH_IMAGES[name]
        vision = {
            **_VISION,
            _WIDTH.get(prefix, "out_hidden_size"): BASE["hidden_size"],
            "deepstack_visual_indexes": [0],
        }
        whole = getattr(transformers, f"{prefix}Config")(text_config=config.to_dict(), vision_config=vision)
        network = getattr(transformers, f"{prefix}ForConditionalGeneration")(whole)
    else:
        network = transformers.AutoModelForCausalLM.from_config(config)
    for at, parameter in network.named_parameters():
        small = "norm" in at or "bias" in at
        centre = 1.0 if "norm" in at and not name.startswith("gemma") else 0.0
        torch.nn.init.normal_(parameter, centre, 0.1 if small else 0.08)
    for at, buffer in network.named_buffers():
        if at.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, 0.0, 0.3)
    network.save_pretrained(folder)
    return workbench.load_model(folder)


def internlm2_of(llama: workbench.Model, folder: Path) -> workbench.Model:
    """The same weights in InternLM2's layout: grouped by KV head, under other names."""
    tensors = load_file(llama.path / "model.safetensors")
    settings = json.loads((llama.path / "config.json").read_text())
    kv_heads = settings["num_key_value_heads"]
    head_dim = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    names = {
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings", "lm_head": "output",
    }  # fmt: skip
    renamed = {}
    for name, tensor in tensors.items():
        if "self_attn.k_proj" in name or "self_attn.v_proj" in name:
            continue
        if "self_attn.q_proj" in name:
            q, k, v = (tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv")
            grouped = [x.view(kv_heads, -1, head_dim, *x.shape[1:]) for x in (q, k, v)]
            whole = torch.cat(grouped, dim=1).reshape(-1, *q.shape[1:])
            renamed[name.replace("self_attn.q_proj", "attention.wqkv")] = whole.contiguous()
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    folder.mkdir(exist_ok=True)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    bias = any(name.endswith("q_proj.bias") for name in tensors)
    settings |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": bias}
    (folder / "config.json").write_text(json.dumps(settings))
    for file in llama.path.glob("tokenizer*"):
        shutil.copy(file, folder / file.name)
    return workbench.load_model(folder)
