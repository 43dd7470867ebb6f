"""The real llama.cpp, after `workbench engines install llama-cpp`: verdicts, quantised weights, flash attention, planted faults."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import workbench
from workbench import GenerationConfig, Prompt
from workbench.engines.environments import ENVIRONMENTS
from workbench.faults import FaultyEngine
from workbench.prompt.ranges import shift

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        ENVIRONMENTS["llama-cpp"].installed is None, reason="needs `workbench engines install llama-cpp`"
    ),
]


@pytest.fixture(scope="module")
def model():
    return workbench.load_model("smollm2-135m")


@pytest.fixture(scope="module")
def engine(model):
    with workbench.open_engine("llama-cpp", model) as opened:
        yield opened


def spliced(model, tokens=44, rows=(5, 15)):
    ids = (model.chat_ids("What is the capital of France? Look at this and say it.") * 40)[:tokens]
    return Prompt(ids, [model.token_rows(ids[slice(*rows)])], [rows])


def test_float32_without_flash_attention_is_noise_at_every_tap(model, engine):
    found = workbench.check_engine(engine, spliced(model))
    assert found.verdict == "noise", str(found)
    assert len(found.taps) == 3 * model.text_config.num_hidden_layers + 3


def test_digit_cards_get_noise():
    cards = workbench.load_model("digit-cards")
    with workbench.open_engine("llama-cpp", cards) as engine:
        found = workbench.check_engine(engine, spliced(cards))
    assert found.verdict == "noise", str(found)


def test_flash_attention_keeps_float16_keys_and_is_no_float32(model):
    """Default flash attention rounds keys and values to float16 inside a float32 model: hundreds of floors, in the attention."""
    with workbench.open_engine("llama-cpp", model, flash_attention=True) as engine:
        found = workbench.check_engine(engine, spliced(model))
    assert found.verdict == "bug"
    assert found.first_divergence.tap == "layers.0.attention"
    assert float(found.ratios.max()) > 100


@pytest.mark.parametrize("weights", ["bf16", "q8_0", "q4_0"])
def test_other_weights_are_compared_with_the_values_they_stand_for(model, weights):
    with workbench.open_engine("llama-cpp", model, weights=weights) as engine:
        stored = engine.model.weights.get("model.layers.0.mlp.up_proj.weight")
        true = model.weights.get("model.layers.0.mlp.up_proj.weight").float()
        off = float((stored - true).norm() / true.norm())
        limits = {"bf16": (1e-5, 4e-3), "q8_0": (1e-3, 2e-2), "q4_0": (2e-2, 0.2)}
        assert limits[weights][0] <= off <= limits[weights][1]
        found = workbench.check_engine(engine, spliced(engine.model))
    assert found.verdict == "noise", str(found)


def test_tokens_logits_and_states_are_those_of_the_reference(model, engine):
    prompt, reference = spliced(model), workbench.open_engine("transformers", model)
    for rows in ("generation", "all"):
        config = GenerationConfig(
            max_new_tokens=6, ignore_eos=True, logprobs=2, output_logits=rows, output_last_hidden_state=rows
        )
        mine, truth = engine.generate(prompt, config), reference.generate(prompt, config)
        assert mine.token_ids == truth.token_ids
        for one, other in ((mine.logits, truth.logits), (mine.last_hidden_state, truth.last_hidden_state)):
            assert one.shape == other.shape
            assert torch.allclose(one.float(), other.float(), atol=1e-3)


def test_many_requests_at_once_get_their_own_tokens(model, engine):
    prompts = [spliced(model, 30 + number, (5 + number, 12 + number)) for number in range(10)]
    config = GenerationConfig(max_new_tokens=4, ignore_eos=True)
    reference = workbench.open_engine("transformers", model)
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda prompt: engine.generate(prompt, config).token_ids, prompts))
    assert found == [reference.generate(prompt, config).token_ids for prompt in prompts]


def test_every_probe_passes(model, engine):
    with workbench.open_engine("llama-cpp", model, batch=64) as chunked:
        report = workbench.probe(engine, spliced(model, 300, (5, 200)), chunked=chunked)
    assert report.passed, str(report)
    assert report["chunks"].passed


def test_planted_faults_are_found(model, engine):
    prompt = spliced(model)
    shifted = FaultyEngine(engine, lambda each: each.replace(embedding_ranges=shift(each.embedding_ranges, 1)))
    found = workbench.check_engine(shifted, prompt)
    assert found.verdict == "bug"
    assert (found.first_divergence.tap, found.first_divergence.token) == ("embed", 6)
    stale = FaultyEngine(engine, lambda each: each.replace(input_embeddings=[each.input_embeddings[0].flip(0)]))
    assert workbench.check_engine(stale, prompt).verdict == "bug"
    with workbench.open_engine("llama-cpp", model, weights="q4_0") as other:
        other.model = model  # as if it had computed the unquantised weights
        assert workbench.check_engine(other, prompt).verdict == "bug"


def test_what_it_does_not_take_is_refused_by_name(model, engine, tmp_path):
    prompt = spliced(model)
    for bad, words in (
        (prompt.replace(position_ids=torch.arange(44) + 3), "positions 0, 1, 2"),
        (prompt.replace(spans=[workbench.Span(attention="bidirectional")]), "bidirectional"),
        (prompt.replace(input_embeddings=[torch.zeros(10, 100)]), "100"),
    ):
        with pytest.raises(workbench.PromptError, match=words):
            engine.generate(bad)
    with pytest.raises(workbench.ModelError, match="choose one of f32, bf16"):
        workbench.open_engine("llama-cpp", model, weights="q2_k")
    with pytest.raises(workbench.ModelError, match="'gemma3_text' is not written as GGUF here"):
        workbench.open_engine("llama-cpp", workbench.load_model("gemma3-270m"))
