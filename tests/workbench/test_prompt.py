"""Prompts: which are refused, with which message, and what the digest depends on."""

import pytest
import torch

from workbench import EmbeddingRangeError, Prompt, PromptError, Span

ROWS = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        (Prompt([]), PromptError, "no tokens"),
        (Prompt([1, 50]), PromptError, r"input_ids\[1\] is 50"),
        (Prompt([1, -3]), PromptError, r"input_ids\[1\] is -3"),
        (Prompt([1, "a"]), PromptError, r"input_ids\[1\] is 'a'"),
        (Prompt([1, 2.5]), PromptError, r"input_ids\[1\] is 2.5"),
        (Prompt([1, 2], [ROWS], [(1, 3)]), EmbeddingRangeError, r"\[1, 3\) leaves the prompt of 2 tokens"),
        (Prompt([1, 2, 3], [ROWS], [(0, 1)]), EmbeddingRangeError, r"input_embeddings\[0\] has 2 rows"),
        (
            Prompt([1, 2, 3], [torch.zeros(2, 5)], [(0, 2)]),
            EmbeddingRangeError,
            "5 wide but the model's hidden size is 4",
        ),
        (
            Prompt([1, 2, 3], [torch.zeros(8)], [(0, 2)]),
            EmbeddingRangeError,
            r"input_embeddings\[0\] is torch.float32 \(8,\)",
        ),
        (Prompt([1, 2, 3], [torch.zeros(2, 4, dtype=torch.int64)], [(0, 2)]), EmbeddingRangeError, "int64"),
        (Prompt([1, 2, 3], [[[0.0] * 4] * 2], [(0, 2)]), EmbeddingRangeError, "list"),
        (
            Prompt([1, 2, 3], [torch.full((2, 4), torch.nan)], [(0, 2)]),
            EmbeddingRangeError,
            "NaN or infinity in 2 of 2 rows",
        ),
        (Prompt([1, 2, 3], [ROWS], [(0, 2)], [Span(), Span()]), EmbeddingRangeError, "2 spans but 1"),
        (Prompt([1, 2], position_ids=torch.arange(3)), PromptError, r"position_ids is \(3,\) for 2 tokens"),
    ],
)
def test_invalid_prompts_are_refused_by_name(prompt, error, words):
    with pytest.raises(error, match=words):
        prompt.check(vocab_size=50, hidden_size=4)


def test_valid_prompt_passes_with_any_placeholder_ids():
    Prompt([1, -200, 999_999, 4], [ROWS], [(1, 3)]).check(vocab_size=50, hidden_size=4)


@pytest.mark.parametrize("ranges", [[3], [(1, 2, 3)], [("a", 2)], [None], 5])
def test_ranges_that_are_not_pairs_are_refused(ranges):
    with pytest.raises(EmbeddingRangeError, match="pairs"):
        Prompt([1, 2, 3], [ROWS], ranges)


def test_digest_depends_on_every_field():
    base = Prompt([1, 2, 3], [ROWS], [(0, 2)])
    assert base.digest == Prompt(torch.tensor([1, 2, 3]), [ROWS.clone()], [[0, 2]]).digest
    others = [
        base.replace(input_ids=[1, 2, 4]),
        base.replace(input_embeddings=[ROWS + 1e-7]),
        base.replace(input_embeddings=[ROWS.half()]),
        base.replace(embedding_ranges=[(1, 3)]),
        base.replace(spans=[Span(attention="bidirectional")]),
        base.replace(position_ids=torch.tensor([0, 1, 2])),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == len(others) + 1
