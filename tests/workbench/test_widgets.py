"""The benches without a browser: what they show follows the controls, and errors appear in the view."""

import io
import threading
import time

import pytest
from PIL import Image

from workbench.widgets import ComparisonBench, LandingBench
from workbench.widgets.latest import Latest


@pytest.fixture(scope="module")
def landing(engine):
    bench = LandingBench(engine, new_tokens=4)
    assert bench.wait()
    return bench


def test_japan_over_france(landing):
    landing.kind.value, landing.word.value = "another word", " Japan"
    landing.start.value, landing.rows.value = 29, 1
    assert landing.wait()
    assert "Nothing before position 29 changes" in landing.status.value
    assert "<b>plain</b>: The capital is<b> Paris" in landing.words.value
    assert "<b>injected</b>: The capital is<b> Tokyo" in landing.words.value
    assert Image.open(io.BytesIO(landing.image.value)).size == (1100, 620)


def test_identity_says_so_and_draws_another_picture(landing):
    before = landing.image.value
    landing.kind.value = "identity"
    assert landing.wait()
    assert "bit for bit" in landing.status.value
    assert landing.image.value != before


def test_moving_the_range_moves_it_in_the_prompt(landing):
    landing.kind.value = "noise"
    landing.start.value, landing.rows.value = 10, 3
    assert landing.wait()
    assert landing.prompt.embedding_ranges == ((10, 13),)
    assert "Nothing before position 10 changes" in landing.status.value


def test_an_error_appears_in_the_view_and_the_bench_goes_on(landing):
    landing.kind.value = "mix"
    landing.word.value = ""
    assert landing.wait()
    assert "has no tokens" in landing.status.value
    landing.word.value = " Japan"
    assert landing.wait()
    assert "Rows injected" in landing.status.value


def test_a_shorter_question_keeps_the_range_inside(landing):
    landing.start.value = landing.start.max
    landing.question.value = "Hi"
    assert landing.wait()
    stop = landing.prompt.embedding_ranges[0][1]
    assert stop <= len(landing.prompt)
    assert "Rows injected" in landing.status.value


def test_figure_for_papers(landing):
    assert len(landing.figure().axes) >= 4


def test_comparison_bench(model):
    bench = ComparisonBench(model)
    assert bench.wait()
    assert bench.comparison.verdict == "noise"
    clean = bench.chart.value
    bench.fault.value = "rows reversed"
    assert bench.wait()
    assert bench.comparison.verdict == "bug"
    assert "bug at tap embed" in bench.status.value
    assert bench.chart.value != clean
    assert len(bench.figures()) == 2


def test_only_the_newest_job_finishes():
    done, errors = [], []
    latest = Latest(errors.append)
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
