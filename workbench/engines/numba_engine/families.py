"""The model families that this engine runs, and how a model's settings are read."""

from __future__ import annotations

import inspect
from dataclasses import replace

import transformers

from ...errors import ModelError
from ...models import Model
from . import dense_families as dense
from . import expert_families as experts
from .architectures import Architecture, DecoderConfig, read_settings


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


_WINDOW = frozenset({"sliding_window"})
_LINEAR = frozenset({"linear_num_value_heads"})
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(dense.llama),
    "mistral": Architecture(dense.mistral, own=_WINDOW),
    "qwen2": Architecture(dense.qwen2, own=_WINDOW),
    "qwen2_vl_text": Architecture(dense.qwen2_vl, own=_WINDOW),
    "qwen2_5_vl_text": Architecture(dense.qwen2_vl, own=_WINDOW),
    "qwen3": Architecture(dense.qwen3, own=_WINDOW),
    "qwen3_vl_text": Architecture(dense.qwen3_vl),
    "internlm2": Architecture(dense.internlm2),
    "internlm3": Architecture(dense.llama),
    "phi3": Architecture(dense.phi3, partial=True, own=_WINDOW),
    "gemma": Architecture(dense.gemma),
    "gemma2": Architecture(dense.gemma2, "hidden_activation", own=_WINDOW),
    "gemma3_text": Architecture(dense.gemma3, "hidden_activation", own=_WINDOW),
    "glm": Architecture(dense.glm, partial=True, interleaved=True),
    "glm4": Architecture(dense.glm4, partial=True, interleaved=True),
    "glm4v_text": Architecture(dense.glm4v, partial=True, interleaved=True),
    "glm_ocr_text": Architecture(dense.glm_ocr, partial=True, interleaved=True),
    "glm4v_moe_text": Architecture(experts.glm4v_moe, partial=True),
    "smollm3": Architecture(dense.smollm3, own=_WINDOW),
    "olmo2": Architecture(dense.olmo2),
    "olmo3": Architecture(dense.olmo3, own=_WINDOW),
    "exaone4": Architecture(dense.exaone4, own=_WINDOW),
    "granite": Architecture(dense.granite),
    "granitemoe": Architecture(experts.granite_moe),
    "cohere": Architecture(dense.cohere, epsilon="layer_norm_eps", interleaved=True),
    "cohere2": Architecture(dense.cohere2, epsilon="layer_norm_eps", own=_WINDOW),
    "ministral": Architecture(dense.ministral, own=_WINDOW),
    "ministral3": Architecture(dense.ministral3, own=_WINDOW),
    "ernie4_5": Architecture(dense.ernie, interleaved=True),
    "ernie4_5_moe": Architecture(experts.ernie_moe, interleaved=True),
    "seed_oss": Architecture(dense.seed_oss),
    "helium": Architecture(dense.helium, interleaved=True),
    "mixtral": Architecture(experts.mixtral, own=_WINDOW),
    "minimax_m2": Architecture(experts.minimax_m2, partial=True),
    "qwen2_moe": Architecture(experts.qwen2_moe, own=_WINDOW),
    "qwen3_moe": Architecture(experts.qwen3_moe, own=_WINDOW),
    "qwen3_vl_moe_text": Architecture(experts.qwen3_vl_moe),
    "olmoe": Architecture(experts.olmoe),
    "glm4_moe": Architecture(experts.glm4_moe, partial=True),
    "deepseek_v2": Architecture(experts.deepseek_v2),
    "deepseek_v3": Architecture(experts.deepseek_v3),
    "glm4_moe_lite": Architecture(experts.deepseek_v3),
    "gpt_oss": Architecture(experts.gpt_oss, own=_WINDOW),
    "qwen3_5_text": Architecture(experts.qwen3_5, partial=True, own=_LINEAR),
    "qwen3_5_moe_text": Architecture(experts.qwen3_5_moe, partial=True, own=_LINEAR),
    "qwen3_next": Architecture(experts.qwen3_next, partial=True, own=_LINEAR),
    "llama4_text": Architecture(experts.llama4, own=frozenset({"attention_chunk_size"})),
}
