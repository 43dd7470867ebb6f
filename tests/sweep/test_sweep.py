"""A sample of the sweep; `make sweep` runs every class."""

from __future__ import annotations

import pytest

from .outcome import judge
from .small_configs import causal_classes, multimodal_classes

CLASSES = {**causal_classes(), **multimodal_classes()}

# Each stands for a kind of class: what it does that a reference can get wrong.
RIGHT = {
    "BloomForCausalLM": "no positions, layers of another name",
    "Cohere2ForCausalLM": "scaled logits, attention and MLP side by side",
    "DeepseekV32ForCausalLM": "attention to indexed keys only",
    "DeepseekV4ForCausalLM": "hyper-connections",
    "Exaone4ForCausalLM": "norms after attention and MLP",
    "FalconForCausalLM": "attention added to the MLP's output in place",
    "FalconH1ForCausalLM": "scaled lookups",
    "GPT2LMHeadModel": "learned positions",
    "GPTNeoXJapaneseForCausalLM": "a bias in the last layer only",
    "Gemma2ForCausalLM": "capped logits, windows",
    "Gemma3nForCausalLM": "inputs for each layer from ids",
    "GptOssForCausalLM": "sinks, experts",
    "GraniteForCausalLM": "scaled embeddings, residuals and logits",
    "Inkling2ForCausalLM": "no single norm before the head",
    "JambaForCausalLM": "attention, Mamba and experts in turn",
    "Llama4ForConditionalGeneration": "a language model with a head of its own inside",
    "MambaForCausalLM": "a cache of another name",
    "MiniCPM3ForCausalLM": "residuals scaled by a root",
    "MixtralForCausalLM": "experts",
    "OPTForCausalLM": "a decoder inside a model",
    "Olmo2ForCausalLM": "norms after attention and MLP",
    "PaliGemmaForConditionalGeneration": "a mask of its own that is not causal",
    "Qwen2VLForConditionalGeneration": "M-RoPE",
    "Qwen3NextForCausalLM": "linear attention",
    "RobertaForCausalLM": "positions that skip padding",
    "RwkvForCausalLM": "a state instead of a cache",
}
REFUSED = {
    "MllamaForConditionalGeneration": "do not run on tokens and embeddings alone",
    "XLMWithLMHeadModel": "tokens attend to later tokens",
    "BlipForConditionalGeneration": "its forward pass fails on plain tokens",
}


@pytest.mark.parametrize("name", RIGHT)
def test_reference_equals_the_classes_own_forward(name):
    outcome = judge(name, CLASSES[name])
    assert outcome.kind == "right", outcome.detail


@pytest.mark.parametrize("name", REFUSED)
def test_classes_that_cannot_be_a_reference_are_refused_by_name(name):
    outcome = judge(name, CLASSES[name])
    assert outcome.kind == "refused"
    assert REFUSED[name] in outcome.detail
    assert name in outcome.detail


def test_missing_head_scale_is_found(monkeypatch):
    """The sweep itself can fail: with the reference's logits halved it says so."""
    from workbench.engines.transformers.network import Network

    own = Network.forward
    monkeypatch.setattr(Network, "forward", lambda *args, **kwargs: _halved(own(*args, **kwargs)))
    assert judge("GraniteForCausalLM", "granite").kind == "wrong"


def _halved(output):
    return type(output)(output.hidden, output.logits / 2, output.cache)
