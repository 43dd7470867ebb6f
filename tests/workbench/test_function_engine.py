"""A function as an engine: judged, probed and explored with the states that it has; what it returns wrongly is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import workbench
from workbench import GenerationConfig
from workbench.benchmarks.random_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return workbench.load_model(write_checkpoint(tmp_path_factory.mktemp("deep"), "deep"))


@pytest.fixture(scope="module")
def network(model):
    return AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompt(model):
    return workbench.Prompt(list(range(3, 43)), [model.token_rows(list(range(5, 14)))], [(20, 29)])


def spliced(model, prompt, shift=0):
    rows = model.token_rows(prompt.lookup_ids)
    for item, (start, stop) in zip(prompt.input_embeddings, prompt.embedding_ranges, strict=True):
        rows[start + shift : stop + shift] = item
    return rows


def logits_of(model, network, dtype=torch.float32, shift=0):
    return lambda prompt: network(inputs_embeds=spliced(model, prompt, shift)[None].to(dtype)).logits[0]


def states_of(model, network):
    def compute(prompt):
        out = network(inputs_embeds=spliced(model, prompt)[None].to(network.dtype), output_hidden_states=True)
        inner = out.hidden_states[1:-1]
        states = {"embed": out.hidden_states[0][0], "norm": out.hidden_states[-1][0], "logits": out.logits[0]}
        return states | {f"layers.{number}": state[0] for number, state in enumerate(inner)}

    return compute


def test_logits_alone_are_judged_and_generate(model, network, prompt):
    engine = workbench.engine_from(logits_of(model, network), model)
    assert engine.capabilities.taps == ("logits",)
    comparison = workbench.check_engine(engine, prompt)
    assert not comparison.failed
    reference = workbench.open_engine("transformers", model, dtype="float32")
    config = GenerationConfig(max_new_tokens=6, ignore_eos=True)
    assert engine.generate(prompt, config).token_ids == reference.generate(prompt, config).token_ids


def test_a_shifted_range_is_a_bug(model, network, prompt):
    engine = workbench.engine_from(logits_of(model, network, shift=1), model)
    assert workbench.check_engine(engine, prompt).verdict == "bug"


def test_states_say_where_and_taps_are_sorted(model, network, prompt):
    compute = states_of(model, network)
    engine = workbench.engine_from(compute, model)
    assert engine.capabilities.taps[:2] == ("embed", "layers.0")
    assert engine.capabilities.taps[-2:] == ("norm", "logits")
    assert not workbench.check_engine(engine, prompt).failed

    def wrong(prompt):
        return compute(prompt) | {"layers.7": compute(prompt)["layers.7"] * 1.01}

    assert workbench.first_divergence(workbench.engine_from(wrong, model), prompt).divergence.tap == "layers.7"
    assert workbench.probe(engine, prompt, only=["canary"]).results[0].passed


def test_an_undeclared_dtype_is_recognised_by_several_states(model, prompt):
    half = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.bfloat16)
    states = states_of(model, half)
    text = str(workbench.check_engine(workbench.engine_from(states, model, dtype="float32"), prompt))
    assert text.startswith("bug")
    assert "rounding to bfloat16 or float16: was that meant, not float32?" in text
    alone = workbench.check_engine(workbench.engine_from(lambda given: states(given)["logits"], model), prompt)
    assert alone.failed
    assert alone.looks_like is None  # a wrong weight would look the same


def test_a_wrong_weight_is_not_called_another_dtype(model, network, prompt):
    def wrong(given):
        with torch.no_grad():
            network.model.layers[20].mlp.down_proj.weight.mul_(1.02)
            out = states_of(model, network)(given)
            network.model.layers[20].mlp.down_proj.weight.div_(1.02)
        return out

    comparison = workbench.check_engine(workbench.engine_from(wrong, model), prompt)
    assert comparison.failed
    assert comparison.looks_like is None


def test_states_that_are_not_finite_are_shown(model, network, prompt):
    """The verdict, its chart and the map, in the view and as figures."""
    from workbench.plots import comparison_figure, to_png

    def overflowing(given):
        logits = logits_of(model, network)(given).clone()
        logits[0] = torch.inf
        logits[1] = torch.nan
        return logits

    explorer = workbench.explore(model, prompt, engine=workbench.engine_from(overflowing, model), new_tokens=1)
    assert explorer.wait()
    assert explorer.comparison.verdict == "bug", explorer.status.value
    assert to_png(comparison_figure(explorer.comparison, explorer.map.tokens)).startswith(b"\x89PNG")
    assert np.isinf(np.frombuffer(explorer.map.values, np.float32)[:2]).all()
    explorer.map.metric = "lens"  # which this engine cannot compute: the rest goes on
    assert explorer.wait()
    assert "does not expose its head" in explorer.map.message
    explorer.editor.embedding_ranges = [[21, 30]]
    assert explorer.wait()
    assert explorer.comparison is not None
    explorer.close()


def test_explore_shows_what_there_is(model, network, prompt):
    explorer = workbench.explore(
        model, prompt, engine=workbench.engine_from(logits_of(model, network), model), new_tokens=2
    )
    assert explorer.wait()
    assert explorer.map.taps == ["logits"], explorer.status.value
    assert explorer.comparison is not None, explorer.status.value
    explorer.close()


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda prompt: 1 / 0, "yours failed on 2 tokens: ZeroDivisionError"),
        (lambda prompt: "no", "returned str as logits"),
        (
            lambda prompt: torch.zeros(1, 2, 4096),
            "shape \\[1, 2, 4096\\]: for 2 tokens it must be \\[2, 4096\\], without the dimension of the batch",
        ),
        (lambda prompt: torch.zeros(2, 4096, dtype=torch.int64), "a tensor of torch.int64 as logits"),
        (lambda prompt: {"layers.99": torch.zeros(2, 64)}, "the tap 'layers.99', which is none of embed"),
        (lambda prompt: {"norm": torch.zeros(2, 7)}, "norm of shape"),
        (lambda prompt: {}, "returned no states"),
        ("text", "needs a function from a prompt to logits, not str"),
    ],
)
def test_other_results_are_refused_by_name(model, compute, message):
    with pytest.raises(workbench.ModelError, match=message):
        workbench.engine_from(compute, model)


def test_other_taps_than_at_first_are_refused(model, network, prompt):
    full, short = states_of(model, network), logits_of(model, network)
    engine = workbench.engine_from(lambda given: full(given) if len(given) == 2 else short(given), model)
    with pytest.raises(workbench.ModelError, match="return the same ones for every prompt"):
        engine.trace(prompt)


@pytest.mark.parametrize("function", ["check_engine", "probe", "first_divergence"])
def test_a_plain_object_is_refused_with_what_is_missing(network, prompt, function):
    with pytest.raises(
        TypeError, match=f"{function} needs an engine, not LlamaForCausalLM, which has no trace.*engine_from"
    ):
        getattr(workbench, function)(network, prompt)


def test_explore_refuses_a_plain_object(model, network, prompt):
    with pytest.raises(TypeError, match="explore needs an engine"):
        workbench.explore(model, prompt, engine=network)


def test_a_cancelled_prefill_of_the_reference_ends_before_its_next_layer(model, prompt):
    engine = workbench.open_engine("transformers", model, dtype="float32")
    seen = []
    layers = engine._net.layers
    layers[5].register_forward_hook(lambda *given: (engine.cancel(7), None)[1])
    layers[6].register_forward_hook(lambda *given: seen.append(6))
    outputs = list(engine.stream(prompt, GenerationConfig(max_new_tokens=4), session_id=7))
    assert [output.status for output in outputs] == [workbench.ResponseType.CANCEL]
    assert seen == []
    assert len(engine.generate(prompt, GenerationConfig(max_new_tokens=2, ignore_eos=True)).token_ids) == 2
