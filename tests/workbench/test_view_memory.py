"""Views free what they hold: widgets, engines and states, also when a notebook's cell runs again."""

from __future__ import annotations

import gc
import weakref

import pytest
from ipywidgets.widgets.widget import _instances

import workbench
from workbench.engines.shared_engines import acquire_engine, release_engine
from workbench.widgets import EngineView, PackingPanel, PatchView, RangeEditor


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    from workbench.benchmarks.random_checkpoint import write_checkpoint

    return workbench.load_model(write_checkpoint(tmp_path_factory.mktemp("deep"), "deep"))


def prompt_for(model, tokens=40):
    width = model.text_config.hidden_size
    rows = model.token_rows(list(range(5, 14)))
    assert rows.shape[1] == width
    return workbench.Prompt(list(range(3, 3 + tokens)), [rows], [(20, 29)])


def test_closing_an_explorer_frees_every_widget_and_its_states(small):
    before = set(_instances)
    explorer = workbench.explore(small, prompt_for(small), new_tokens=2)
    assert explorer.wait()
    assert explorer.comparison is not None
    assert len(set(_instances) - before) > 60
    states = weakref.ref(explorer._incremental), weakref.ref(explorer.map.maps)
    explorer.close()
    gc.collect()
    assert [type(_instances[name]).__name__ for name in set(_instances) - before] == []
    assert [state() for state in states] == [
        None,
        None,
    ]  # although the explorer itself is kept, as a notebook's history does


@pytest.mark.parametrize("kind", [RangeEditor, PatchView, PackingPanel, EngineView])
def test_every_view_frees_its_widgets(small, tmp_path, kind):
    before = set(_instances)
    prompt = prompt_for(small)
    with workbench.open_engine("numba", small) as engine:
        arguments = {
            RangeEditor: (prompt, small),
            PatchView: (prompt,),
            PackingPanel: ([prompt],),
            EngineView: (engine,),
        }
        view = kind(*arguments[kind])
        assert set(_instances) - before
        view.close()
    assert set(_instances) - before == set()


def test_explorers_share_an_engine_which_the_last_one_closes(small):
    first, second = (workbench.explore(small, prompt_for(small), judge=False, new_tokens=1) for _ in range(2))
    assert first.engine is second.engine
    first.close()
    assert not second.engine.closed
    second.close()
    assert second.engine.closed


def test_engine_that_was_closed_is_opened_again(small):
    engine = acquire_engine("numba", small, "float32")
    engine.close()
    again = acquire_engine("numba", small, "float32")
    assert again is not engine
    release_engine(again)
    assert again.closed


class Cell:
    """What IPython knows about the running cell."""

    def __init__(self):
        self.run = 0

    def get_parent(self):
        return {"metadata": {"cellId": "a"}, "header": {"msg_id": str(self.run)}}


def test_running_a_cell_again_closes_the_explorers_of_its_last_run(small, monkeypatch):
    cell = Cell()
    monkeypatch.setattr("IPython.get_ipython", lambda: cell)
    with workbench.open_engine("numba", small) as engine:
        first, second = (workbench.explore(small, prompt_for(small), engine=engine, judge=False) for _ in range(2))
        assert first.view.comm is not None  # two of one run both stay
        before = set(_instances)
        for cell.run in range(1, 4):
            third = workbench.explore(small, prompt_for(small), engine=engine, judge=False)
            assert first.view.comm is second.view.comm is None
            assert third.view.comm is not None
            assert len(_instances) <= len(before)
        third.close()


def test_malformed_ranges_are_refused_and_the_worker_lives(small):
    import traitlets

    explorer = workbench.explore(small, prompt_for(small), judge=False, new_tokens=1)
    assert explorer.wait()
    for wrong in ([[True, 52]], [[1 << 60, 2]], [[1.5, 2]], [[1]], "x"):
        with pytest.raises(traitlets.TraitError):
            explorer.editor.embedding_ranges = wrong
    explorer.editor.embedding_ranges = [[20, 10**12]]
    assert explorer.wait(60)
    assert explorer.patches.items[0]["rows"] == 20
    explorer._jobs._failed = lambda error: 1 / 0  # even if an error cannot be shown
    explorer.editor.embedding_ranges = [[30, 29]]
    assert explorer.wait(60)
    explorer._jobs._failed = explorer._show_error
    explorer.editor.embedding_ranges = [[21, 30]]
    assert explorer.wait(60)
    assert "Ranges moved: [21, 30)" in explorer.status.value
    explorer.close()


def test_states_are_computed_again_only_where_they_changed(small):
    """Maps of a moved range equal those of a new explorer, bit for bit, although most columns are kept."""
    prompt = prompt_for(small, 80)
    explorer = workbench.explore(small, prompt, judge=False, new_tokens=1)
    assert explorer.wait()
    explorer.editor.embedding_ranges = [[60, 69]]
    assert explorer.wait()
    assert explorer._incremental.computed == 60
    moved = explorer.map.values
    fresh = workbench.explore(small, prompt.replace(embedding_ranges=[(60, 69)]), judge=False, new_tokens=1)
    assert fresh.wait()
    assert fresh.map.values == moved
    for each in (explorer, fresh):
        each.close()
