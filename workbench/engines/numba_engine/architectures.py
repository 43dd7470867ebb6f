"""Decoder settings, read from Transformers' configurations; one `Architecture` for every model family that this engine runs.

Everything specific to a family is in this file. Unsupported settings are rejected by name, never approximated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import ModelError
from ...models.model import embedding_scale
from .rope import Rope, read_rope

Projections = Literal["separate", "fused", "internlm2"]


@dataclass(frozen=True)
class Names:
    """Names of tensors in the checkpoint: of a layer after `layers.N.`, and of the embedding table and the head.

    A norm that the family does not have is None.
    """

    attention_norm: str = "input_layernorm"
    after_attention: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    after_mlp: str | None = None
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = "self_attn.qkv_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str = "mlp.gate_up_proj"
    down: str = "mlp.down_proj"
    table: str = "embed_tokens"
    head: str = "lm_head"


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that a decoder needs to know about its model.

    Attributes:
        windows: for each layer, how many keys a token attends to, itself included; None for all.
        ropes: for each layer its rotary embedding, None if positions are not encoded (SmolLM3's NoPE layers).
        scale: factor on attention scores; `softcap` and `final_softcap`: c in `c * tanh(x / c)` on scores and logits, 0 for none.
        head_norms: whether queries and keys are normalised per head, before rotation.
        norm_offset: added to norm weights (Gemma stores weight - 1).
        embedding_scale: factor on looked-up rows.
        mrope: how many channel pairs rotate by time, height and width; empty for plain positions.
        interleaved_mrope: whether the axes are interleaved (Qwen3-VL) or in consecutive sections (Qwen2-VL).
    """

    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    epsilon: float
    windows: tuple[int | None, ...]
    ropes: tuple[Rope | None, ...]
    scale: float
    names: Names = Names()
    qkv: Projections = "separate"
    fused_gate_up: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    norm_offset: float = 0.0
    gelu: bool = False
    softcap: float = 0.0
    final_softcap: float = 0.0
    embedding_scale: float = 1.0
    mrope: tuple[int, ...] = ()
    interleaved_mrope: bool = False
    deepstack: bool = False


def read_decoder_config(config: Any, name: str) -> DecoderConfig:
    """Read the decoder settings from Transformers' text configuration `config` of the model `name`.

    Raises:
        ModelError: a family or a setting that this engine does not support.
    """
    family = config.model_type
    if family not in ARCHITECTURES:
        raise ModelError(
            f"the numba engine runs {', '.join(sorted(ARCHITECTURES))}; {name!r} is {family!r}: use 'transformers'"
        )
    architecture = ARCHITECTURES[family]
    _refuse(config, architecture, name)
    fields: dict[str, Any] = {
        "family": family,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "vocab": config.vocab_size,
        "epsilon": config.rms_norm_eps,
        "windows": (None,) * config.num_hidden_layers,
        "embedding_scale": embedding_scale(config),
        "gelu": getattr(config, architecture.activation) not in ("silu", "swish"),
    }
    fields["scale"] = fields["head_dim"] ** -0.5
    fields |= architecture.read(config)
    if "ropes" not in fields:
        rope = read_rope(config, fields["head_dim"], name, architecture.partial, architecture.interleaved)
        fields["ropes"] = (rope,) * config.num_hidden_layers
    return DecoderConfig(**fields)


@dataclass(frozen=True)
class Architecture:
    """How to read one family's configuration.

    Attributes:
        read: returns the `DecoderConfig` fields in which the family differs from a Llama without biases.
        activation: name of the setting that contains the activation.
        partial: whether `partial_rotary_factor` applies; interleaved: whether rotated pairs are adjacent channels (GLM).
        own: settings that this family supports; configurations of other families that have them are rejected.
    """

    read: Callable[[Any], dict[str, Any]]
    activation: str = "hidden_act"
    partial: bool = False
    interleaved: bool = False
    own: frozenset[str] = frozenset()


_ACTIVATIONS = {"silu", "swish", "gelu_pytorch_tanh"}
# Settings that change what Transformers computes and that this engine does not support, unless a family lists one in `own`.
_UNSUPPORTED = (
    "attention_chunk_size",
    "use_bidirectional_attention",
    "_per_layer_config",
    "kv_sharing_modes",
)


def _refuse(config: Any, architecture: Architecture, name: str) -> None:
    def refuse(setting: str, value: Any, needed: str) -> None:
        raise ModelError(f"the numba engine needs {setting}={needed}; {name!r} has {setting}={value!r}")

    activation = getattr(config, architecture.activation)
    if activation not in _ACTIVATIONS:
        refuse(architecture.activation, activation, " or ".join(sorted(_ACTIVATIONS)))
    for setting in _UNSUPPORTED:
        value = getattr(config, setting, None)
        if value and setting not in architecture.own:
            refuse(setting, value, "None")
    if getattr(config, "is_causal", True) is False:
        refuse("is_causal", False, "True")
    if getattr(config, "pretraining_tp", 1) not in (1, None):
        refuse("pretraining_tp", config.pretraining_tp, "1")
    types = set(getattr(config, "layer_types", None) or ())
    unknown = types - {"full_attention"} - ({"sliding_attention"} if "sliding_window" in architecture.own else set())
    if unknown:
        refuse("layer_types", sorted(unknown)[0], "full_attention")


def _llama(config: Any) -> dict[str, Any]:
    biased = config.attention_bias
    return {"qkv_bias": biased, "output_bias": biased, "mlp_bias": config.mlp_bias}


def _internlm2(config: Any) -> dict[str, Any]:
    names = Names(
        attention_norm="attention_norm", mlp_norm="ffn_norm", qkv="attention.wqkv", output="attention.wo",
        gate="feed_forward.w1", up="feed_forward.w3", down="feed_forward.w2", table="tok_embeddings", head="output",
    )  # fmt: skip
    return {"qkv": "internlm2", "qkv_bias": config.bias, "output_bias": config.bias, "names": names}


def _windows(config: Any) -> tuple[int | None, ...]:
    """Windows by `layer_types`; without that setting, the same window in all layers."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _mistral(config: Any) -> dict[str, Any]:
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
    return {"qkv": "fused", "fused_gate_up": True, "windows": _windows(config)}


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
    ropes = {kind: read_rope(config, config.head_dim, "gemma3", layer_type=kind) for kind in set(config.layer_types)}
    return {
        **_gemma2(config),
        "softcap": 0.0,  # Transformers never applies attn_logit_softcapping here
        "head_norms": True,
        "ropes": tuple(ropes[kind] for kind in config.layer_types),
    }


def _glm(config: Any) -> dict[str, Any]:
    return {"qkv_bias": config.attention_bias, "fused_gate_up": True}


def _glm4(config: Any) -> dict[str, Any]:
    names = Names(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
    return {**_glm(config), "names": names}


def _smollm3(config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = read_rope(config, head_dim, "smollm3")
    ropes = tuple(rope if used else None for used in config.no_rope_layers)  # 1 means that the layer uses RoPE
    return {**_llama(config), "windows": _windows(config), "ropes": ropes}


_WINDOW = frozenset({"sliding_window"})
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
    "smollm3": Architecture(_smollm3, own=_WINDOW),
}
