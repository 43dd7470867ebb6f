"""Attention weights and direct logit attribution against Transformers' own weights and exact sums, on every family."""

import numpy as np
import pytest
import torch

import workbench
from tests.workbench.small_architectures import DISTINCT, save
from tests.workbench.test_architectures import SPANS, prompt_for
from workbench.analysis.attention import attention_of
from workbench.analysis.logit_attribution import logit_attribution

POSITIONS = [0, 7, 21, -1]


@pytest.fixture(scope="module", params=DISTINCT)
def family(request, tmp_path_factory):
    model = save(request.param, tmp_path_factory.mktemp("family"))
    return model, workbench.open_engine("numba", model), prompt_for(request.param, model.text_config)


def eager_weights(model, prompt):
    """Attention weights of all layers as Transformers' eager attention returns them, `[heads, queries, keys]` each."""
    reference = workbench.open_engine("transformers", model)
    found = []

    def keep(module, inputs, output):
        if isinstance(output, tuple) and len(output) > 1 and output[1] is not None:
            found.append(output[1][0])

    network = reference.network
    network.set_attn_implementation("eager")
    hooks = [
        module.register_forward_hook(keep)
        for name, module in network.named_modules()
        if name.endswith((".self_attn", ".attention"))
    ]
    reference.trace(prompt, ["logits"], [len(prompt) - 1])
    for hook in hooks:
        hook.remove()
    return found


def test_weights_are_those_of_transformers(family):
    model, engine, prompt = family
    config = engine.decoder.config
    layers = [layer for layer in range(config.layers) if not config.is_linear(layer)]
    for layer in set(range(config.layers)) - set(layers):
        with pytest.raises(workbench.ModelError, match=f"layer {layer} of .* linear attention"):
            attention_of(engine, prompt, [layer], POSITIONS)
    found = attention_of(engine, prompt, layers, POSITIONS)
    wanted = eager_weights(model, prompt)
    if len(wanted) != len(layers):
        pytest.skip("this class does not return its attention weights")
    for layer, weights in zip(layers, wanted, strict=True):
        rows = found.layers[layer]
        theirs = weights[:, POSITIONS].transpose(0, 1).double()
        assert (rows.weights - theirs).abs().max() < 1e-5
        assert not rows.weights[~rows.visible[:, None].expand_as(rows.weights)].any()
    shares = found.by_group()
    sums = [found.layers[layer].weights.sum(dim=-1) for layer in layers]  # less than 1 if a sink takes its share
    assert np.allclose(shares.sum(axis=-1), np.stack(sums))
    assert (max(float(each.max()) for each in sums) < 0.999) == engine.decoder.config.sinks


def test_parts_and_ranges_add_up_to_the_difference(family):
    _, engine, prompt = family
    refused = {
        "caps its logits": engine.decoder.config.final_softcap,
        "linear attention": engine.decoder.config.delta_net,
    }
    for words in (words for words, setting in refused.items() if setting):
        with pytest.raises(workbench.ModelError, match=words):
            logit_attribution(engine, prompt, 3, 5)
        return
    found = logit_attribution(engine, prompt, 3, 5)
    largest = np.abs(found.values).max()
    assert abs(found.values.sum() - found.difference) < 1e-5 * max(largest, 1.0)
    attention = [value for name, value in zip(found.parts, found.values, strict=True) if name.endswith("attention")]
    assert np.abs(found.by_group.sum(axis=1) - attention).max() < 1e-5 * max(largest, 1.0)


def test_bidirectional_spans_are_seen_to_their_end(tmp_path):
    model = save("llama", tmp_path)
    engine = workbench.open_engine("numba", model)
    prompt = prompt_for("llama", model.text_config).replace(spans=SPANS)
    start, stop = prompt.embedding_ranges[1]
    rows = attention_of(engine, prompt, [1], [start]).layers[1]
    assert rows.visible[0].nonzero().flatten().tolist() == list(range(stop))


def test_what_does_not_exist_is_refused(tmp_path):
    model = save("llama", tmp_path)
    engine, prompt = workbench.open_engine("numba", model), prompt_for("llama", model.text_config)
    with pytest.raises(ValueError, match="layer 9: the model has layers 0 to"):
        attention_of(engine, prompt, [9])
    with pytest.raises(ValueError, match="give positions in the prompt"):
        attention_of(engine, prompt, [0], [len(prompt)])
    with pytest.raises(ValueError, match="ids are 0 to"):
        logit_attribution(engine, prompt, 0, 10**6)
    other = workbench.open_engine("transformers", model)
    with pytest.raises(ValueError, match="layer 9: the model has layers 0 to"):
        attention_of(other, prompt, [9])
    width, vocab = model.text_config.hidden_size, model.text_config.vocab_size
    function = workbench.engine_from(
        lambda prompt: {"embed": torch.zeros(len(prompt), width), "logits": torch.zeros(len(prompt), vocab)}, model
    )
    with pytest.raises(workbench.ModelError, match="does not expose queries and keys"):
        attention_of(function, prompt, [0])
    with pytest.raises(workbench.ModelError, match="does not take patches"):
        function.trace(prompt, ["logits"], patches=[workbench.Patch("embed", [0], torch.zeros(1, width))])
    with pytest.raises(workbench.ModelError, match="transformers does not expose"):
        logit_attribution(other, prompt, 0, 1)


def test_long_prompts_need_no_matrix_of_all_queries(tmp_path):
    model = save("llama", tmp_path, max_position_embeddings=8192)
    engine = workbench.open_engine("numba", model)
    ids = torch.randint(90, (8192,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = attention_of(engine, workbench.Prompt(ids), [0], [-1]).layers[0]
    assert rows.weights.shape[-1] == 8192
    assert torch.allclose(rows.weights.sum(dim=-1), torch.ones_like(rows.weights[..., 0]))
