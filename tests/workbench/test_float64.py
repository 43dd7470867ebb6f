"""The float64 reference against a Llama written in NumPy: every operation must run in float64."""

import numpy as np
import pytest
import torch

import workbench
from tests.workbench.small_models import VARIANTS, random_prompt, save_llama


def numpy_llama(model: workbench.Model, prompt: workbench.Prompt) -> np.ndarray:
    """Logits `[seq, vocab]` of a bias-free Llama with default rope, float64."""
    config, get = model.config, lambda name: model.weights.get(name).double().numpy()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads

    def norm(x, name):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.rms_norm_eps) * get(name)

    x = get("model.embed_tokens.weight")[list(prompt.input_ids)]
    for item, (start, stop) in zip(prompt.input_embeddings, prompt.embedding_ranges, strict=True):
        x[start:stop] = item.double().numpy()
    angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rotate(y):
        a, b = y[..., : size // 2], y[..., size // 2 :]
        return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)

    visible = np.tril(np.ones((len(x), len(x)), dtype=bool))
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        y = norm(x, at + "input_layernorm.weight")
        q, k, v = ((y @ get(f"{at}self_attn.{part}_proj.weight").T).reshape(len(x), -1, size) for part in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(z, heads // kv_heads, axis=1) for z in (k, v))
        scores = np.where(visible, np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1) @ get(at + "self_attn.o_proj.weight").T
        y = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (y @ get(f"{at}mlp.{part}_proj.weight").T for part in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ get(at + "mlp.down_proj.weight").T
    return norm(x, "model.norm.weight") @ get("lm_head.weight").T


def test_reference_is_float64_in_every_operation(tmp_path):
    model, prompt = save_llama(tmp_path), random_prompt()
    reference = workbench.open_engine("transformers", model, dtype="float64")
    logits = reference.trace(prompt, ["logits"])["logits"]
    assert logits.dtype == torch.float64
    reference = numpy_llama(model, prompt)
    assert np.linalg.norm(logits.numpy() - reference) / np.linalg.norm(reference) < 1e-14


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tap_of_the_reference_is_float64(tmp_path, name):
    reference = workbench.open_engine("transformers", save_llama(tmp_path, **VARIANTS[name]), dtype="float64")
    trace = reference.trace(random_prompt(), ["embed", "layers.*", "layers.*.*", "norm", "logits"])
    assert {state.dtype for state in trace.values()} == {torch.float64}


def test_casting_only_the_model_leaves_float32_errors(tmp_path):
    """Why `float64.py` exists: the error of a model that is only cast to float64 is far above float64 rounding."""
    model, prompt = save_llama(tmp_path), random_prompt()
    cast = workbench.open_engine("transformers", model, dtype="float32")
    cast.network.double()
    reference = numpy_llama(model, prompt)
    error = np.linalg.norm(cast.trace(prompt, ["logits"])["logits"].numpy() - reference) / np.linalg.norm(reference)
    assert error > 1e-9
