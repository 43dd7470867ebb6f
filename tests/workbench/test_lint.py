"""Lint findings, and the effective prompt that each target computes according to its rules."""

import pytest
import torch

import workbench
from workbench import EmbeddingRangeError, Prompt, Span, effective_prompt, lint


def codes(findings):
    return [finding.code for finding in findings]


def item(rows, value):
    return torch.full((rows, 576), float(value)) * torch.linspace(0.9, 1.1, 576)


def test_valid_prompt_has_no_findings(model, japan):
    assert lint(japan[0], model) == []
    assert codes(lint(japan[0], model, "turbomind==0.18.0")) == ["target-accepts"]


def test_all_faults_are_reported_together(model):
    prompt = Prompt([1, 2, 99999, 4, 5, 6], [torch.zeros(2, 64), torch.full((1, 576), torch.nan)], [(3, 5), (5, 9)])
    assert codes(lint(prompt, model)) == [
        "id-vocabulary",
        "item-width",
        "item-finite",
        "range-bounds",
        "row-count",
        "row-norm",
    ]
    for finding in lint(prompt, model):
        assert finding.message.strip()


def test_rows_with_an_unusual_norm_give_a_warning(model, japan):
    prompt = japan[0].replace(input_embeddings=[japan[0].input_embeddings[0] * 1000])
    (finding,) = lint(prompt, model)
    assert (finding.code, finding.severity, finding.item) == ("row-norm", "warning", 0)


def test_turbomind_shifts_rows_from_item_to_item():
    """First item two rows too long: accepted, and the second range gets the first item's last rows."""
    prompt = Prompt(range(10), [item(4, 1), item(2, 2)], [(1, 3), (5, 7)])
    assert "target-differs" in codes(lint(prompt, target="turbomind"))
    computed = effective_prompt(prompt, "turbomind==0.18.0")
    assert torch.equal(computed.input_embeddings[0], item(2, 1))
    assert torch.equal(computed.input_embeddings[1], item(2, 1))
    assert not list(computed.findings(20, 576))


@pytest.mark.parametrize(
    ("items", "ranges", "words"),
    [
        ([item(2, 1)], [(9, 11)], "past the prompt of 10"),
        ([item(1, 1)], [(1, 3)], "need 2 rows, the items have 1"),
        ([item(2, 1), item(2, 2)], [(5, 7), (1, 3)], "begins at 1, before 7"),
        ([item(2, 1)], [(-1, 1)], "begins at -1"),
    ],
)
def test_turbomind_rejects_bad_ranges_and_before_012_ignores_items(items, ranges, words):
    prompt = Prompt(range(10), items, ranges)
    with pytest.raises(EmbeddingRangeError, match=words):
        effective_prompt(prompt, "turbomind==0.18.0")
    old = effective_prompt(prompt, "turbomind==0.11.1")
    assert (old.input_ids, old.input_embeddings, old.embedding_ranges) == (tuple(range(10)), (), ())


def test_turbomind_drops_reversed_ranges_positions_and_spans():
    prompt = Prompt(
        range(10), [item(2, 1), item(2, 2)], [(4, 2), (3, 5)], [Span(attention="bidirectional")] * 2, torch.zeros(3, 10)
    )
    computed = effective_prompt(prompt, "turbomind==0.18.0")
    assert computed.embedding_ranges == ((3, 5),)
    assert torch.equal(computed.input_embeddings[0], item(2, 1))
    assert computed.spans == ()
    assert computed.position_ids is None
    assert effective_prompt(prompt, "turbomind==0.15.0").position_ids is not None


def test_lmdeploy_pytorch_engine_ignores_embeddings_since_065(japan):
    injected, plain = japan
    assert effective_prompt(injected, "lmdeploy-pytorch==0.6.5").digest == plain.digest
    assert effective_prompt(injected, "lmdeploy-pytorch==0.6.4").digest == injected.digest
    assert effective_prompt(injected, "lmdeploy-pytorch==0.4.2").digest == plain.digest
    assert effective_prompt(injected, "transformers").digest == injected.digest


def test_a_wrong_answer_is_explained_by_the_effective_prompt(model, engine, japan):
    """Given the effective prompt, a correct engine gives the answer that the target gives."""
    config = workbench.GenerationConfig(max_new_tokens=8)
    answer = engine.generate(effective_prompt(japan[0], "lmdeploy-pytorch"), config)
    assert model.tokenizer.decode(answer.token_ids) == "The capital of France is Paris."


@pytest.mark.parametrize("target", ["llama.cpp", "turbomind==abc", "", "turbomind=0.18"])
def test_unknown_targets_are_refused_by_name(japan, target):
    with pytest.raises(ValueError, match=r"no rules for target|is not a version"):
        lint(japan[0], target=target)
