"""Each kind of injected rows is what its name describes."""

import pytest
import torch

from workbench import PromptError
from workbench.models.embedding_rows import injected_rows


def test_each_kind_gives_the_rows_it_describes(model):
    table, ids = model.embedding_table, [10, 20, 30]
    (japan,) = model.tokenizer.encode(" Japan", add_special_tokens=False)
    assert torch.equal(injected_rows("identity", model, ids), table[ids])
    other = injected_rows("another word", model, ids, word=" Japan")
    assert torch.equal(other, table[[japan] * 3])
    mix = injected_rows("mix", model, ids, word=" Japan", share=0.25)
    assert torch.allclose(mix, 0.75 * table[ids] + 0.25 * other)
    noise = injected_rows("noise", model, ids, seed=1)
    assert torch.allclose(noise.norm(dim=1), table[ids].norm(dim=1))
    assert torch.equal(noise, injected_rows("noise", model, ids, seed=1))
    assert not torch.equal(noise, injected_rows("noise", model, ids, seed=2))


def test_unknown_kinds_and_empty_words_are_refused(model):
    with pytest.raises(PromptError, match="no injection 'x'"):
        injected_rows("x", model, [1])
    with pytest.raises(PromptError, match="has no tokens"):
        injected_rows("another word", model, [1])
