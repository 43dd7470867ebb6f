"""What a decoder computes, read from its configuration: one record for every family that this engine runs.

A family's peculiarities stand here and nowhere else. What is not known to be computed is refused by name, never approximated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import ModelError
from ...models import embedding_scale
from .rope import Rope, read_rope

Projections = Literal["separate", "fused", "internlm2"]


@dataclass(frozen=True)
class Names:
    """Where a layer's tensors stand, after `layers.N.`; None for a norm that the family does not have."""

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
class Backbone:
    """The decoder of one model.

    Attributes:
        windows: for each layer, keys a token sees backwards, itself included; None for all.
        ropes: for each layer its rotation, None where positions are not encoded (SmolLM3's NoPE layers).
        scale: factor on attention scores; `softcap` and `final_softcap`: c in `c * tanh(x / c)` on scores and logits, 0 for none.
        head_norms: whether queries and keys are normalised a head at a time, before rotation.
        norm_offset: added to norm weights (Gemma stores them less one).
        embedding_scale: factor on looked-up rows.
        mrope: how many channels turn by time, height and width; empty for plain positions.
        interleaved_mrope: whether the axes take turns (Qwen3-VL) or follow each other (Qwen2-VL).
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


def read_backbone(config: Any, name: str) -> Backbone:
    """The backbone of a text configuration.

    Raises:
        ModelError: a family or a setting that this engine does not compute.
    """
    family = config.model_type
    if family not in FAMILIES:
        raise ModelError(
            f"the numba engine runs {', '.join(sorted(FAMILIES))}; {name!r} is {family!r}: use 'transformers'"
        )
    kind = FAMILIES[family]
    _refuse(config, kind, name)
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
        "gelu": getattr(config, kind.activation) not in ("silu", "swish"),
    }
    fields["scale"] = fields["head_dim"] ** -0.5
    fields |= kind.read(config)
    if "ropes" not in fields:
        rope = read_rope(config, fields["head_dim"], name, kind.partial, kind.interleaved)
        fields["ropes"] = (rope,) * config.num_hidden_layers
    return Backbone(**fields)


@dataclass(frozen=True)
class Kind:
    """How to read one family's configuration.

    Attributes:
        read: the fields in which it differs from a Llama without biases.
        activation: the setting that names the activation.
        partial: whether `partial_rotary_factor` counts; interleaved: whether pairs are neighbours (GLM).
        own: settings that other families must not have and this one computes.
    """

    read: Callable[[Any], dict[str, Any]]
    activation: str = "hidden_act"
    partial: bool = False
    interleaved: bool = False
    own: frozenset[str] = frozenset()


_ACTIVATIONS = {"silu", "swish", "gelu_pytorch_tanh"}
# Settings under which Transformers computes something else than these decoders do. A family that computes one names it in `own`.
_FOREIGN = (
    "attention_chunk_size",
    "use_bidirectional_attention",
    "_per_layer_config",
    "kv_sharing_modes",
)


def _refuse(config: Any, kind: Kind, name: str) -> None:
    def refuse(setting: str, value: Any, needed: str) -> None:
        raise ModelError(f"the numba engine needs {setting}={needed}; {name!r} has {setting}={value!r}")

    activation = getattr(config, kind.activation)
    if activation not in _ACTIVATIONS:
        refuse(kind.activation, activation, " or ".join(sorted(_ACTIVATIONS)))
    for setting in _FOREIGN:
        value = getattr(config, setting, None)
        if value and setting not in kind.own:
            refuse(setting, value, "None")
    if getattr(config, "is_causal", True) is False:
        refuse("is_causal", False, "True")
    if getattr(config, "pretraining_tp", 1) not in (1, None):
        refuse("pretraining_tp", config.pretraining_tp, "1")
    types = set(getattr(config, "layer_types", None) or ())
    unknown = types - {"full_attention"} - ({"sliding_attention"} if "sliding_window" in kind.own else set())
    if unknown:
        refuse("layer_types", sorted(unknown)[0], "full_attention")
    if getattr(config, "quantization_config", None):
        raise ModelError(f"the numba engine reads plain weights; {name!r} is quantized: dequantize it first")


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
    """By `layer_types`, or the same window in all layers where there are none."""
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
    ropes = tuple(rope if used else None for used in config.no_rope_layers)  # 1 means that the layer does rotate
    return {**_llama(config), "windows": _windows(config), "ropes": ropes}


_WINDOW = frozenset({"sliding_window"})
FAMILIES: dict[str, Kind] = {
    "llama": Kind(_llama),
    "mistral": Kind(_mistral, own=_WINDOW),
    "qwen2": Kind(_qwen2, own=_WINDOW),
    "qwen2_vl_text": Kind(_qwen2_vl, own=_WINDOW),
    "qwen2_5_vl_text": Kind(_qwen2_vl, own=_WINDOW),
    "qwen3": Kind(_qwen3, own=_WINDOW),
    "qwen3_vl_text": Kind(_qwen3_vl),
    "internlm2": Kind(_internlm2),
    "internlm3": Kind(_llama),
    "phi3": Kind(_phi3, partial=True, own=_WINDOW),
    "gemma": Kind(_gemma),
    "gemma2": Kind(_gemma2, "hidden_activation", own=_WINDOW),
    "gemma3_text": Kind(_gemma3, "hidden_activation", own=_WINDOW),
    "glm": Kind(_glm, partial=True, interleaved=True),
    "glm4": Kind(_glm4, partial=True, interleaved=True),
    "smollm3": Kind(_smollm3, own=_WINDOW),
}
