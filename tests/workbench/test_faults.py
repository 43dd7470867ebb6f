"""Every injected fault is found, and the first divergence is where it was injected.

The rows are written to test-artifacts/faults.md and must be those of data/faults.md.
"""

from pathlib import Path

import pytest
import torch

import workbench
from tests.workbench.small_architectures import save
from tests.workbench.small_models import save_llama
from workbench.faults import FAULTS, as_markdown, fault_prompt, faults_of, find_fault, report_row
from workbench.faults.inject import prefill_in_two_chunks

ROOT = Path(__file__).parents[2]
ARCHITECTURE = {
    "softcap": "gemma2",
    "window": "mistral, window",
    "head norms": "qwen3",
    "bias": "qwen2",
    "embedding scale": "gemma",
}
TRACED = [fault.name for fault in faults_of("prompt", "engine")]
pytestmark = pytest.mark.xdist_group("faults")  # the last test needs all rows in one process
seen: list[dict[str, str]] = []


@pytest.fixture(scope="module")
def architectures(tmp_path_factory):
    models = {need: save(name, tmp_path_factory.mktemp("model")) for need, name in ARCHITECTURE.items()}
    return {"": save_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=8), **models}


def case(fault, architectures):
    """A small model that has what the fault needs, and a prompt of 90 tokens with two items."""
    model, generator = architectures[fault.needs], torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (90,), generator=generator).tolist()
    rows = model.token_rows(torch.randint(3, 97, (12,), generator=generator).tolist())
    return model, fault_prompt(ids, rows, fault.bidirectional)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACED)
def test_fault_is_found_where_it_was_injected(name, architectures):
    fault = FAULTS[name]
    subject, prompt = case(fault, architectures)
    with workbench.open_engine("numba", subject) as engine:
        found = find_fault(fault, engine, prompt)
    label = f"small {ARCHITECTURE.get(fault.needs, 'llama').split(',')[0]}"
    row = report_row(fault, label, found, subject.text_config.num_hidden_layers)
    seen.append(row)
    assert (row["found"], row["right place"]) == ("yes", "yes"), str(found)
    assert fault.diagnosis in ("", found.explanation.kind), str(found)


@pytest.mark.slow
def test_no_divergence_without_a_fault(architectures):
    for name in ("range +1", "causal instead of bidirectional", "softcap dropped"):
        subject, prompt = case(FAULTS[name], architectures)
        with workbench.open_engine("numba", subject) as engine:
            found = workbench.first_divergence(engine, prompt)
        assert found.divergence is None, str(found)


@pytest.mark.slow
def test_prefill_in_two_chunks_alone_changes_nothing(architectures):
    """The KV page faults run a prefill in two chunks; that part of them is not a fault."""
    subject, prompt = case(FAULTS["stale page"], architectures)
    with workbench.open_engine("numba", subject) as opened:
        engine = prefill_in_two_chunks(opened, lambda second: None)
        assert workbench.first_divergence(engine, prompt).divergence is None


@pytest.mark.slow
def test_published_table_is_what_was_found():
    """Runs last; compares nothing if only some of the tests were selected."""
    if len(seen) != len(TRACED):
        pytest.skip("needs every fault to have run")
    artifacts = ROOT / "test-artifacts"
    artifacts.mkdir(exist_ok=True)
    table = as_markdown(seen)
    (artifacts / "faults.md").write_text(table)
    assert table in (ROOT / "data" / "faults.md").read_text()


def test_a_model_with_too_few_layers_is_refused(tmp_path):
    with (
        workbench.open_engine("numba", save_llama(tmp_path)) as engine,
        pytest.raises(ValueError, match="'two layers exchanged' needs a model of at least 5 layers; this one has 3"),
    ):
        FAULTS["two layers exchanged"].inject(engine)


def test_names_are_unique_and_described():
    assert all(name == fault.name and fault.description for name, fault in FAULTS.items())
    assert {fault.kind for fault in FAULTS.values()} == {"prompt", "engine", "batching", "invalid prompt"}
