"""InternLM2's configuration, which Transformers lacks: the family ships as remote code, which does not have to run here."""

from __future__ import annotations

from functools import cache


@cache
def register() -> None:
    """Let Transformers' AutoConfig read configurations with `model_type` internlm2, whose fields are Llama's plus `bias`."""
    from transformers import AutoConfig, LlamaConfig

    class InternLM2Config(LlamaConfig):
        model_type = "internlm2"
        bias: bool = True  # of the attention's projections

    AutoConfig.register("internlm2", InternLM2Config, exist_ok=True)
