"""The real vLLM, after `workbench engines install vllm`: verdicts, probes, planted faults, bad input."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import workbench
from workbench import GenerationConfig, Prompt
from workbench.engines.environments import ENVIRONMENTS
from workbench.engines.types import ResponseType
from workbench.errors import EngineDied
from workbench.faults import FaultyEngine
from workbench.prompt.ranges import shift

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(ENVIRONMENTS["vllm"].installed is None, reason="needs `workbench engines install vllm`"),
]


@pytest.fixture(scope="module")
def model():
    return workbench.load_model("smollm2-135m")


@pytest.fixture(scope="module")
def engine(model):
    with workbench.open_engine("vllm", model) as opened:
        yield opened


def spliced(model, tokens=44, rows=(5, 15)):
    ids = (model.chat_ids("What is the capital of France? Look at this and say it.") * 40)[:tokens]
    return Prompt(ids, [model.token_rows(ids[slice(*rows)])], [rows])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_verdict_is_noise(model, dtype):
    with workbench.open_engine("vllm", model, dtype=dtype) as engine:
        found = workbench.check_engine(engine, spliced(model))
    assert found.verdict == "noise", str(found)
    assert len(found.taps) == 3 * model.text_config.num_hidden_layers + 3


def test_digit_cards_get_noise(model):
    cards = workbench.load_model("digit-cards")
    with workbench.open_engine("vllm", cards) as engine:
        found = workbench.check_engine(engine, spliced(cards))
    assert found.verdict == "noise", str(found)


def test_tokens_logprobs_and_states_are_those_of_the_reference(model, engine):
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
        for one, other in zip(mine.logprobs, truth.logprobs, strict=True):
            assert one.keys() == other.keys()
            assert all(abs(one[token] - other[token]) < 1e-3 for token in one)


def test_many_requests_at_once_stream_their_own_tokens(model, engine):
    prompts = [spliced(model, 30 + number, (5 + number, 12 + number)) for number in range(6)]
    config = GenerationConfig(max_new_tokens=5, ignore_eos=True)
    reference = workbench.open_engine("transformers", model)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda prompt: engine.generate(prompt, config).token_ids, prompts))
    assert found == [reference.generate(prompt, config).token_ids for prompt in prompts]


def test_a_cancelled_request_ends_and_others_go_on(model, engine):
    stream = engine.stream(spliced(model), GenerationConfig(max_new_tokens=400, ignore_eos=True), session_id=7)
    next(stream)
    engine.cancel(7)
    assert list(stream)[-1].status is ResponseType.CANCEL
    assert len(engine.generate(spliced(model), GenerationConfig(max_new_tokens=3, ignore_eos=True)).token_ids) == 3


def test_every_probe_passes(model, engine):
    with workbench.open_engine("vllm", model, max_prefill_tokens=128, prefix_cache=True) as chunked:
        report = workbench.probe(engine, spliced(model, 300, (5, 200)), chunked=chunked)
        assert report.passed, str(report)
        assert report["chunks"].passed
        cached = workbench.probe(chunked, spliced(model, 300, (5, 200)), only=["prefix cache", "decode"])
        assert cached.passed, str(cached)
        found = workbench.check_engine(chunked, spliced(model, 300, (5, 200)))
        assert found.verdict == "noise", str(found)


def test_planted_faults_are_found(model, engine):
    prompt = spliced(model)
    shifted = FaultyEngine(engine, lambda each: each.replace(embedding_ranges=shift(each.embedding_ranges, 1)))
    found = workbench.check_engine(shifted, prompt)
    assert found.verdict == "bug"
    assert found.first_divergence.tap == "embed"
    assert found.first_divergence.token == 6  # token 5 has its own row back
    stale = FaultyEngine(engine, lambda each: each.replace(input_embeddings=[each.input_embeddings[0].flip(0)]))
    assert workbench.check_engine(stale, prompt).verdict == "bug"
    engine.scale_layer(11, 1.01)
    try:
        found = workbench.check_engine(engine, prompt)
        assert found.verdict == "bug"
        assert found.first_divergence.tap.startswith("layers.11")
    finally:
        engine.scale_layer(11, 1.0)
    assert workbench.check_engine(engine, prompt).verdict == "noise"


def test_what_vllm_does_not_take_is_refused_by_name(model, engine):
    prompt = spliced(model)
    for bad, words in (
        (prompt.replace(position_ids=torch.arange(44) + 3), "takes no positions with embeddings"),
        (prompt.replace(spans=[workbench.Span(attention="bidirectional")]), "bidirectional"),
        (prompt.replace(input_embeddings=[torch.zeros(10, 100)]), "100"),
        (prompt.replace(input_embeddings=[torch.full((10, 576), torch.nan)]), "NaN or infinity"),
    ):
        with pytest.raises(workbench.PromptError, match=words):
            engine.generate(bad)
    with pytest.raises(workbench.PromptError, match="bad_token_ids"):
        engine.generate(prompt, GenerationConfig(bad_token_ids=[1]))


def test_a_wrong_width_ends_vllm_and_not_this_process(model):
    prompt = spliced(model)
    with workbench.open_engine("vllm", model, check=False, patience=60) as engine:
        with pytest.raises(EngineDied, match=r"failed inside a step \(RuntimeError: The size of tensor a \(576\)"):
            engine.generate(prompt.replace(input_embeddings=[prompt.input_embeddings[0][:, :100]]))
        with pytest.raises(EngineDied, match="open the engine again"):
            engine.generate(prompt)
