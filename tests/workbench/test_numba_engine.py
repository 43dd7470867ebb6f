"""The Numba engine against Transformers: small random models of every kind it supports, then the built-in one."""

import pytest
import torch

import workbench
from tests.workbench.small_models import VARIANTS, random_prompt, save_llama
from workbench import GenerationConfig, Prompt, Span
from workbench.comparison.metrics import relative_error

EVERY_TAP = ["embed", "layers.*", "layers.*.*", "norm", "logits"]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tap_equals_transformers(tmp_path, name):
    model = save_llama(tmp_path, **VARIANTS[name])
    prompt = random_prompt()
    ours = workbench.open_engine("numba", model).trace(prompt, EVERY_TAP)
    theirs = workbench.open_engine("transformers", model).trace(prompt, EVERY_TAP)
    assert list(ours) == list(theirs)
    for tap in ours:
        assert relative_error(ours[tap], theirs[tap]).max() < 1e-5, tap


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_tokens_equal_transformers_generate(tmp_path, name):
    """Prefill and decode, against Transformers' own `generate(inputs_embeds=...)`."""
    model = save_llama(tmp_path, **VARIANTS[name])
    prompt = random_prompt()
    reference = workbench.open_engine("transformers", model)
    embeds = reference.splice(prompt)[None]
    expected = reference.network.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2]),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=-1,
    )[0].tolist()
    config = GenerationConfig(max_new_tokens=24, ignore_eos=True)
    for engine in (workbench.open_engine("numba", model), reference):
        assert engine.generate(prompt, config).token_ids == expected


def test_bidirectional_spans_equal_a_dense_mask(tmp_path):
    model, prompt = save_llama(tmp_path), random_prompt()
    prompt = prompt.replace(spans=[Span(attention="causal"), Span(attention="bidirectional")])
    ours = workbench.open_engine("numba", model)
    theirs = workbench.open_engine("transformers", model)
    a, b = ours.trace(prompt, EVERY_TAP), theirs.trace(prompt, EVERY_TAP)
    assert max(float(relative_error(a[tap], b[tap]).max()) for tap in a) < 1e-5
    causal = ours.trace(prompt.replace(spans=()), ["layers.0"])["layers.0"]
    changed = (causal != a["layers.0"]).any(dim=1).nonzero().flatten().tolist()
    assert changed == list(range(20, 28))  # all of the span but its last token, which attends to the whole span anyway


def test_given_positions_equal_transformers(tmp_path):
    model = save_llama(tmp_path)
    prompt = random_prompt().replace(position_ids=torch.arange(40) * 3 + 7)
    config = GenerationConfig(max_new_tokens=8, ignore_eos=True, output_logits="all")
    ours, theirs = (workbench.open_engine(kind, model).generate(prompt, config) for kind in ("numba", "transformers"))
    assert ours.token_ids == theirs.token_ids
    assert relative_error(ours.logits, theirs.logits).max() < 1e-5


def test_unsupported_architecture_is_refused_by_name(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(workbench.ModelError, match="'gpt2': use 'transformers'"):
        workbench.open_engine("numba", workbench.load_model(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "words"), [({"dtype": "float64"}, "float32, bfloat16"), ({"dtype": "int8"}, "int8")]
)
def test_unsupported_dtypes_are_refused_by_name(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        workbench.open_engine("numba", model, **arguments)


def test_identity_injection_is_bit_identical(model, engine, japan):
    _, plain = japan
    own = model.embedding_table[list(plain.input_ids[5:9])]
    identity = Prompt(plain.input_ids, [own], [(5, 9)])
    a, b = engine.trace(plain, EVERY_TAP), engine.trace(identity, EVERY_TAP)
    assert all(torch.equal(a[tap], b[tap]) for tap in a)
    config = GenerationConfig(max_new_tokens=12, output_logits="all")
    one, other = engine.generate(plain, config), engine.generate(identity, config)
    assert one.token_ids == other.token_ids
    assert torch.equal(one.logits, other.logits)


def test_japan_over_france_turns_paris_into_tokyo(model, engine, reference, japan):
    config = GenerationConfig(max_new_tokens=16)
    for runner in (engine, reference):
        answers = [model.tokenizer.decode(runner.generate(prompt, config).token_ids) for prompt in japan]
        assert answers == ["The capital of Japan is Tokyo.", "The capital of France is Paris."]


def test_states_before_the_range_are_bit_identical(engine, japan):
    injected, plain = japan
    start = injected.embedding_ranges[0][0]
    a, b = engine.trace(injected, EVERY_TAP), engine.trace(plain, EVERY_TAP)
    for tap in a:
        assert torch.equal(a[tap][:start], b[tap][:start])
        assert not torch.equal(a[tap][start], b[tap][start])
