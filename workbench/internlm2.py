"""InternLM2's configuration, which Transformers does not have: the family ships as remote code, which nothing here needs to run."""

from __future__ import annotations

from functools import cache


@cache
def register() -> None:
    """Let Transformers read configurations of `model_type` internlm2; their fields are Llama's and `bias`."""
    from transformers import AutoConfig, LlamaConfig

    class InternLM2Config(LlamaConfig):
        model_type = "internlm2"
        bias: bool = True  # of the attention's projections

    AutoConfig.register("internlm2", InternLM2Config, exist_ok=True)
