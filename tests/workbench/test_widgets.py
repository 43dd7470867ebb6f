"""Explorer and views without a browser: what they show follows the controls, and errors appear in the view."""

import threading
import time

import pytest

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench import GenerationConfig
from workbench.plots import schedule_figure
from workbench.widgets import EngineView, RangeEditor
from workbench.widgets.latest_job import LatestJob


@pytest.fixture(scope="module")
def explorer(engine):
    explorer = workbench.explore(
        engine.model, engine=engine, inject="another word", word=" Japan", at=" France", answer_start="The capital is",
        judge=False, new_tokens=4,
    )  # fmt: skip
    assert explorer.wait()
    yield explorer
    explorer.close()


def test_injecting_japan_over_france_changes_the_answer(explorer):
    assert explorer.answer().startswith(" Tokyo")
    assert "The first token whose states change is 29" in explorer.status.value
    assert "The capital is<b> Tokyo" in explorer.words.value


def test_identity_injection_is_bit_identical(explorer):
    before = explorer.map.values
    explorer.injection.kind.value = "identity"
    assert explorer.wait()
    assert "bit for bit" in explorer.status.value
    assert explorer.map.values != before
    assert explorer.answer().startswith(" Paris")


def test_injected_rows_follow_the_range(explorer):
    explorer.injection.kind.value = "noise"
    explorer.editor.embedding_ranges = [[10, 13]]
    assert explorer.wait()
    assert explorer.prompt.embedding_ranges == ((10, 13),)
    assert len(explorer.prompt.input_embeddings[0]) == 3
    assert "The first token whose states change is 10" in explorer.status.value


def test_error_appears_in_the_view_and_the_explorer_continues(explorer):
    explorer.injection.kind.value = "mix"
    explorer.injection.word.value = ""
    assert explorer.wait()
    assert "has no tokens" in explorer.status.value
    explorer.injection.word.value = " Japan"
    assert explorer.wait()
    assert "Ranges" in explorer.status.value


def test_words_to_replace_must_be_in_the_question(model, engine):
    with pytest.raises(workbench.PromptError, match="at=' Peru' is not part of the prompt"):
        workbench.explore(model, engine=engine, inject="noise", at=" Peru")


@pytest.mark.parametrize(("setting", "value"), [("inject", "nothing"), ("fault", "range +100")])
def test_unknown_menu_entries_are_refused(model, engine, setting, value):
    with pytest.raises(ValueError, match="choose one of"):
        workbench.explore(model, engine=engine, **{setting: value})


def stored(view):
    """The data that a notebook stores for a displayed view."""
    data, _ = view._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    return data


def test_fault_menu_injects_a_fault(model, engine):
    explorer = workbench.explore(model, engine=engine, inject="mix", word=" Japan", at=" capital of", new_tokens=1)
    assert explorer.wait()
    assert explorer.comparison.verdict == "noise"
    clean, chart = stored(explorer)["image/png"], explorer.verdict.chart.value
    explorer.fault.value = "rows reversed"
    assert explorer.wait()
    assert explorer.comparison.verdict == "bug"
    assert "bug at tap embed" in explorer.verdict.banner.value
    assert explorer.verdict.chart.value != chart
    assert "bug at tap embed" in explorer.verdict.figure().axes[0].get_title(loc="left")
    assert stored(explorer)["image/png"] != clean
    explorer.close()


def test_close_releases_the_engine_that_explore_opened(tmp_path_factory, model):
    explorer = workbench.explore(model, judge=False, new_tokens=1)
    assert explorer.wait()
    engine = explorer.engine
    explorer.close()
    with pytest.raises(workbench.ModelError, match="was closed"):
        engine.generate(explorer.prompt)


def test_only_the_newest_job_finishes():
    done, errors = [], []
    latest = LatestJob(errors.append)
    release = threading.Event()

    def job(number):
        def steps():
            yield
            if number == 0:
                release.wait(10)
            yield
            done.append(number)

        return steps

    for number in range(4):
        latest.submit(job(number))
        time.sleep(0.01)
    release.set()
    assert latest.wait(10)
    assert done == [3]

    def fails():
        raise RuntimeError("shown")
        yield

    latest.submit(fails)
    assert latest.wait(10)
    assert [str(error) for error in errors] == ["shown"]


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    engine = workbench.open_engine("numba", save_llama(tmp_path_factory.mktemp("llama")), max_prefill_token_num=16)
    for _ in range(2):
        engine.generate(random_prompt(0, 70), GenerationConfig(max_new_tokens=4, ignore_eos=True))
    return engine


class TestEngineView:
    def test_schedule_figure_shows_the_history(self, worked):
        """Red marks ranges; widths in the figure are numbers of tokens per step."""
        figure = schedule_figure(worked.history, ["first", "second"])
        above, below = figure.axes[:2]
        assert [label.get_text() for label in above.get_yticklabels()] == ["first", "second"]
        red = [
            each for each in above.patches if each.get_facecolor()[:3] == pytest.approx((0.82, 0.286, 0.357), abs=0.01)
        ]
        scale = 0.92 / 16
        # [4, 9) and [20, 29) in chunks of 16 tokens; the second time 64 tokens came from the cache, with all ranges.
        assert [round(each.get_width() / scale) for each in red] == [5, 9]
        assert [int(each.get_x()) for each in red] == [0, 1]
        tokens = [sum(len(chunk) for chunk in step.chunks) for step in worked.history]
        heights: dict[float, float] = {}
        for bar in below.patches:
            heights[round(bar.get_x(), 3)] = heights.get(round(bar.get_x(), 3), 0) + bar.get_height()
        assert [heights[key] for key in sorted(heights)] == tokens
        assert "64" in [text.get_text() for text in above.texts]

    def test_view_follows_the_engine_until_stopped(self, worked):
        with EngineView(worked, seconds=0.01) as live:
            before = live.image.value
            finished = worked.stats().finished
            worked.generate(random_prompt(1, 70), GenerationConfig(max_new_tokens=4, ignore_eos=True))
            until = time.monotonic() + 20
            while f"{finished + 1} finished" not in live.numbers.value or live.image.value == before:
                assert time.monotonic() < until
                time.sleep(0.01)
        assert live.error.value == ""
        shown = live.numbers.value
        worked.generate(random_prompt(2, 70), GenerationConfig(max_new_tokens=4, ignore_eos=True))
        assert live.numbers.value == shown

    def test_error_is_shown_in_the_view(self, worked, monkeypatch):
        view = EngineView(worked, seconds=0.01, steps=0)
        monkeypatch.setattr(worked, "stats", lambda: 1 / 0)
        view.open()
        until = time.monotonic() + 10
        while not view.error.value and time.monotonic() < until:
            time.sleep(0.01)
        assert "ZeroDivisionError" in view.error.value
        monkeypatch.undo()
        view.close()

    def test_unsupported_engine_is_refused_by_name(self, reference):
        with pytest.raises(TypeError, match="shows the numba engine, not TransformersReference"):
            EngineView(reference)


class TestRangeEditor:
    @pytest.fixture
    def editor(self, model, japan):
        return RangeEditor(japan[0], model, "turbomind==0.18.0")

    def test_editor_shows_the_prompt(self, editor, japan):
        assert editor.tokens[29] == " France"
        assert 0 in editor.special
        assert editor.embedding_ranges == [[29, 30]]
        assert [each["code"] for each in editor.findings] == ["target-accepts"]
        assert editor.prompt.digest == japan[0].digest

    def test_setting_ranges_or_prompt_updates_the_other(self, editor, japan):
        editor.embedding_ranges = [[28, 29]]
        assert editor.prompt.embedding_ranges == ((28, 29),)
        editor.prompt = japan[0].replace(embedding_ranges=[(27, 28)])
        assert editor.embedding_ranges == [[27, 28]]

    @pytest.mark.parametrize(
        ("ranges", "code"),
        [
            ([[28, 31]], "row-count"),
            ([[36, 99]], "range-bounds"),
            ([[5, 5]], "range-empty"),
            ([[9, 5]], "range-reversed"),
            ([[0, 1]], "range-over-control"),
            ([], "item-count"),
            ([[29, 30], [30, 31]], "item-count"),
        ],
    )
    def test_findings_follow_the_ranges_and_are_sorted_by_severity(self, editor, ranges, code):
        editor.embedding_ranges = ranges
        found = editor.findings
        assert code in [each["code"] for each in found]
        order = [("error", "warning", "info").index(each["severity"]) for each in found]
        assert order == sorted(order)
        assert editor.figure().axes

    def test_unknown_target_is_refused(self, model, japan):
        with pytest.raises(ValueError, match="no rules for target"):
            RangeEditor(japan[0], model, "llama.cpp")

    def test_error_in_lint_is_shown_as_a_finding(self, editor, monkeypatch):
        monkeypatch.setattr("workbench.widgets.range_editor.lint", lambda *a, **k: 1 / 0)
        editor.embedding_ranges = [[3, 4]]
        assert editor.findings[0]["message"].startswith("lint failed: ZeroDivisionError")
