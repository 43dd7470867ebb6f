"""Every planted fault is caught, and the first divergence names the place where it was planted.

The rows are written to test-artifacts/mutants.md and must be those of data/mutants.md.
"""

from pathlib import Path

import pytest
import torch

import workbench
from workbench.compare.mutants import MUTANTS, as_markdown, judge, mutant_prompt, outcome
from workbench.compare.mutants.plant import in_two_chunks

from .families import save

ROOT = Path(__file__).parents[2]
FAMILY = {
    "softcap": "gemma2",
    "window": "mistral, window",
    "head norms": "qwen3",
    "bias": "qwen2",
    "embedding scale": "gemma",
}
TEXT = (
    "The river runs past the old mill, and every winter the miller's daughter counts the lights on the far shore. She writes each "
    "number into a small green book, next to the name of the day and the colour of the sky. Nobody has ever asked her why, and she "
    "has never told. When the ice breaks in spring she closes the book, puts it on the shelf and opens the window to hear the water."
)
ROWS = " seven mountain engines sing under green paper stars between doctors music letters bread stone window"
seen: list[dict[str, str]] = []


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return {need: save(name, tmp_path_factory.mktemp("family")) for need, name in FAMILY.items()}


def case(mutant, real, families):
    if not mutant.needs:
        ids = real.tokenizer.encode(TEXT, add_special_tokens=False)
        return real, mutant_prompt(
            ids, real.token_rows(real.tokenizer.encode(ROWS, add_special_tokens=False)[:12]), mutant.both_ways
        )
    model, generator = families[mutant.needs], torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (90,), generator=generator).tolist()
    return model, mutant_prompt(ids, model.token_rows(torch.randint(3, 97, (12,), generator=generator).tolist()))


@pytest.mark.parametrize("name", MUTANTS)
def test_it_is_caught_where_it_is(name, model, families):
    mutant = MUTANTS[name]
    subject, prompt = case(mutant, model, families)
    found = judge(mutant, workbench.open_engine("numba", subject), prompt)
    label = f"small {FAMILY[mutant.needs].split(',')[0]}" if mutant.needs else subject.name
    row = outcome(mutant, label, found, subject.text_config.num_hidden_layers)
    seen.append(row)
    assert (row["caught"], row["right place"]) == ("yes", "yes"), str(found)
    assert mutant.kind in ("", found.explanation.kind), str(found)


def test_without_a_fault_there_is_none(model, families):
    for mutant in (MUTANTS["range +1"], MUTANTS["causal where both ways"], MUTANTS["softcap dropped"]):
        subject, prompt = case(mutant, model, families)
        found = workbench.first_divergence(workbench.open_engine("numba", subject), prompt)
        assert found.divergence is None, str(found)


def test_two_chunks_alone_are_no_fault(model, families):
    """What the KV page mutants do beside their fault changes nothing."""
    subject, prompt = case(MUTANTS["stale page"], model, families)
    engine = in_two_chunks(workbench.open_engine("numba", subject), lambda second: None)
    assert workbench.first_divergence(engine, prompt).divergence is None


def test_the_published_table_is_what_was_seen():
    """Run last; with a selection of tests there is nothing to hold against it."""
    if len(seen) != len(MUTANTS):
        pytest.skip("needs every mutant to have run")
    artifacts = ROOT / "test-artifacts"
    artifacts.mkdir(exist_ok=True)
    table = as_markdown(seen)
    (artifacts / "mutants.md").write_text(table)
    assert table in (ROOT / "data" / "mutants.md").read_text()
