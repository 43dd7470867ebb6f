"""Decoder settings, and how they are read from Transformers' configurations.

Unsupported settings are rejected by name, never approximated. The families are in `families.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from range_kernels.experts import ClippedGate

from ...errors import ModelError
from ...models.model import embedding_scale
from .rope import Rope, read_rope

Projections = Literal["separate", "fused", "internlm2"]


@dataclass(frozen=True)
class Names:
    """Names of tensors in the checkpoint: of a layer after `layers.N.`, and of the embedding table and the head.

    A norm that the family does not have is None.
    """

    attention_norm: str | None = "input_layernorm"
    after_attention: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
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
    sinks: str = "self_attn.sinks"
    table: str = "embed_tokens"
    head: str = "lm_head"


@dataclass(frozen=True)
class AttentionBlocks:
    """A token attends to keys of its own block of `size` positions only (Llama 4's chunked attention)."""

    size: int


Window = int | AttentionBlocks | None
"""How many keys a token attends to, itself included; None: all."""


@dataclass(frozen=True)
class QueryScale:
    """Factor on queries that grows with the position: `1 + weight * log(1 + floor((position + offset) / length))`.

    Attributes:
        rotary: whether positions are rotary positions (Ministral 3), or indices in the sequence (Llama 4).
    """

    weight: float
    length: int
    offset: int = 0
    rotary: bool = True

    def of(self, positions: np.ndarray) -> np.ndarray:
        """The factors, float32, of integer `positions`, in their shape."""
        return (1 + self.weight * np.log1p(np.floor((positions + self.offset) / self.length))).astype(np.float32)


Scores = Literal["softmax", "softmax of chosen", "sigmoid"]


@dataclass(frozen=True)
class MixtureConfig:
    """A mixture of experts in place of the MLP.

    Attributes:
        layers: for each layer whether it has one.
        count, chosen: number of experts, and how many of them a token uses.
        intermediate: of one expert; shared_intermediate: of the expert that all tokens use, 0 for none.
        scores: of the router's logits: softmax over all experts, softmax over the chosen ones, or sigmoid each.
        normalised: whether the weights of the chosen experts are divided by their sum; `floor` is added to it, or it is at least that.
        scale: factor on the weights.
        groups, chosen_groups: experts are chosen from the best groups only (DeepSeek-V3); 1 for none.
        group_best: how many experts of a group make its score.
        wide_router: whether the router computes in float32 whatever the dtype.
        router_bias, expert_bias, shared_bias: whether the router, the experts and the shared expert have biases; choice_bias: name of the tensor that is added to scores for choosing only.
        scaled_input, clipped: as in `range_kernels.experts.Experts`.
        stored: stacked weights as `[experts, outputs, inputs]`, "transposed", or "either" by their shape.
        router, experts, shared, shared_gate: names after `layers.N.`; shared_gate None: the shared expert is not gated.
        parts: names of an expert's gate, up and down weights, if they are stored expert by expert; stacked: of stacked weights.
    """

    layers: tuple[bool, ...]
    count: int
    chosen: int
    intermediate: int
    scores: Scores = "softmax"
    normalised: bool = True
    floor: float = 0.0
    floor_added: bool = True
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    group_best: int = 2
    wide_router: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    shared_bias: bool = False
    choice_bias: str | None = None
    shared_intermediate: int = 0
    shared_gate: str | None = None
    scaled_input: bool = False
    clipped: ClippedGate | None = None
    stored: Literal["straight", "transposed", "either"] = "straight"
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    shared: str = "mlp.shared_experts"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacked: tuple[str, str] = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@dataclass(frozen=True)
class DeltaNetConfig:
    """Linear attention by a gated delta rule, in place of some layers' attention.

    Attributes:
        layers: for each layer whether it has it.
        heads, key_heads: number of (value) heads, and of heads of queries and keys, each for `heads // key_heads` of them.
        kernel: length of the convolution.
        grouped: whether the input product's rows are grouped by key head (Qwen3-Next).
    """

    layers: tuple[bool, ...]
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    grouped: bool = False

    @property
    def state_bytes(self) -> int:
        """Bytes of one request's states, in float32."""
        numbers = self.heads * self.key_dim * self.value_dim + (self.kernel - 1) * self.channels
        return 4 * sum(self.layers) * numbers

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek).

    Attributes:
        query_rank: of the latent of queries; None if they have none. kv_rank: of the latent of keys and values.
        plain_dim, rotated_dim: channels of a head's queries and keys without and with rotation. value_dim: of its values.
    """

    query_rank: int | None
    kv_rank: int
    plain_dim: int
    rotated_dim: int
    value_dim: int


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that a decoder needs to know about its model.

    Attributes:
        windows: for each layer, which keys a token attends to.
        ropes: for each layer its rotary embedding, None if positions are not encoded (SmolLM3's NoPE layers).
        scale: factor on attention scores; `softcap` and `final_softcap`: c in `c * tanh(x / c)` on scores and logits, 0 for none.
        head_norms: whether queries and keys are normalised before rotation, per head or, with `wide_head_norms`, all heads together (OLMo 2).
        unit_heads: for each layer whether queries and keys are divided by their root mean square after rotation (Llama 4).
        query_scale: factor on queries by position, in the layers for which `scaled_queries` is true.
        sinks: whether each head has a logit that takes part in the softmax and has no value (gpt-oss).
        norm_offset: added to norm weights (Gemma stores weight - 1).
        layer_norms: whether norms subtract the mean (Cohere).
        parallel: whether attention and MLP read the same norm (Cohere).
        residual_scale: factor on what attention and MLP add (Granite); logit_scale: factor on logits.
        mixture: a mixture of experts in place of some layers' MLPs.
        delta_net: linear attention in place of some layers' attention.
        latent: multi-head latent attention in all layers.
        gated_attention: whether the query projection also yields a gate, whose sigmoid multiplies what attention returns (Qwen3.5).
        embedding_scale: factor on looked-up rows; input_scale: factor on looked-up and injected rows (Granite).
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
    windows: tuple[Window, ...]
    ropes: tuple[Rope | None, ...]
    scale: float
    names: Names = Names()
    qkv: Projections = "separate"
    fused_gate_up: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    wide_head_norms: bool = False
    unit_heads: tuple[bool, ...] = ()
    query_scale: QueryScale | None = None
    scaled_queries: tuple[bool, ...] = ()
    sinks: bool = False
    norm_offset: float = 0.0
    layer_norms: bool = False
    parallel: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    mixture: MixtureConfig | None = None
    delta_net: DeltaNetConfig | None = None
    latent: LatentConfig | None = None
    gated_attention: bool = False
    gelu: bool = False
    softcap: float = 0.0
    final_softcap: float = 0.0
    embedding_scale: float = 1.0
    input_scale: float = 1.0
    mrope: tuple[int, ...] = ()
    interleaved_mrope: bool = False
    deepstack: bool = False

    @property
    def plain(self) -> bool:
        """Whether every layer is one that `range_kernels.ops.decoder_layers` can run."""
        different = (
            self.wide_head_norms, any(self.unit_heads), self.query_scale, self.sinks, self.layer_norms, self.parallel,
            self.residual_scale != 1.0, self.mixture, self.names.attention_norm is None, self.delta_net, self.gated_attention,
            self.latent,
        )  # fmt: skip
        return not any(different)

    @property
    def value_dim(self) -> int:
        """Channels of a head's values; the KV cache pads them to `head_dim`."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    def is_linear(self, layer: int) -> bool:
        """Whether a layer has linear attention."""
        return self.delta_net is not None and self.delta_net.layers[layer]

    @property
    def attention_layers(self) -> int:
        """The number of layers that keep keys and values."""
        return self.layers - (sum(self.delta_net.layers) if self.delta_net else 0)

    def cache_layer(self, layer: int) -> int:
        """The index of an attention layer's keys and values in the cache, or of a linear one's state."""
        linear = self.delta_net.layers[:layer] if self.delta_net else ()
        return sum(linear) if self.is_linear(layer) else layer - sum(linear)


def read_settings(config: Any, architecture: Architecture, name: str) -> DecoderConfig:
    """Read the decoder settings from Transformers' text configuration `config` of the model `name`.

    Raises:
        ModelError: a setting that this engine does not support.
    """
    _refuse(config, architecture, name)
    fields: dict[str, Any] = {
        "family": config.model_type,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "hidden": config.hidden_size,
        "intermediate": getattr(config, "intermediate_size", 0),
        "vocab": config.vocab_size,
        "epsilon": getattr(config, architecture.epsilon),
        "windows": (None,) * config.num_hidden_layers,
        "embedding_scale": embedding_scale(config),
        "gelu": getattr(config, architecture.activation) not in ("silu", "swish"),
    }
    fields["scale"] = fields["head_dim"] ** -0.5
    try:
        fields |= architecture.read(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(
            f"the configuration of {name!r} cannot be read as {config.model_type!r}: {type(error).__name__}: {error}; correct the setting"
        ) from error
    if "ropes" not in fields:
        rotated = fields["head_dim"] if (latent := fields.get("latent")) is None else latent.rotated_dim
        rope = read_rope(config, rotated, name, architecture.partial, architecture.interleaved)
        fields["ropes"] = (rope,) * config.num_hidden_layers
    settings = DecoderConfig(**fields)
    _check_numbers(settings, name)
    return settings


def _check_numbers(settings: DecoderConfig, name: str) -> None:
    """Refuse numbers that do not fit together, which would fail in a request."""
    mixture, layers = settings.mixture, settings.layers
    lengths = {
        "layer_types": len(settings.windows),
        "rotary embeddings (no_rope_layers)": len(settings.ropes),
        "unit_heads": len(settings.unit_heads or settings.ropes),
        "linear layers (layer_types)": layers if settings.delta_net is None else len(settings.delta_net.layers),
    }
    wrong = {what: length for what, length in lengths.items() if length != layers}
    if wrong:
        raise ModelError(f"{name!r} has num_hidden_layers={layers}, but {wrong}: correct its configuration")
    if settings.attention_layers == 0:
        raise ModelError(
            f"the numba engine needs a layer with attention; all {layers} of {name!r} have linear attention"
        )
    if mixture is None:
        return
    if not 1 <= mixture.chosen <= mixture.count:
        raise ModelError(
            f"{name!r} chooses {mixture.chosen} of {mixture.count} experts per token: correct num_experts_per_tok"
        )
    if mixture.groups < 1 or mixture.count % mixture.groups or not 1 <= mixture.chosen_groups <= mixture.groups:
        raise ModelError(
            f"{name!r} has {mixture.count} experts in {mixture.groups} groups, of which {mixture.chosen_groups} are chosen: correct n_group "
            "and topk_group"
        )
    if mixture.groups > 1 and mixture.count // mixture.groups < mixture.group_best:
        raise ModelError(
            f"{name!r} has {mixture.count // mixture.groups} experts per group, and {mixture.group_best} are ranked: correct n_group"
        )


@dataclass(frozen=True)
class Architecture:
    """How to read one family's configuration.

    Attributes:
        read: returns the `DecoderConfig` fields in which the family differs from a Llama without biases.
        activation, epsilon: names of the settings that contain the activation and the norms' epsilon.
        partial: whether `partial_rotary_factor` applies; interleaved: whether rotated pairs are adjacent channels (GLM).
        own: settings that this family supports; configurations of other families that have them are rejected.
    """

    read: Callable[[Any], dict[str, Any]]
    activation: str = "hidden_act"
    epsilon: str = "rms_norm_eps"
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
    kinds = {
        "sliding_window": "sliding_attention",
        "attention_chunk_size": "chunked_attention",
        "linear_num_value_heads": "linear_attention",
    }
    unknown = types - {"full_attention"} - {kind for setting, kind in kinds.items() if setting in architecture.own}
    if unknown:
        refuse("layer_types", sorted(unknown)[0], "full_attention")
