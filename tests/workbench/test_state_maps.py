"""Hidden-state maps: values checked by hand, colour limits, logit lens, neighbours; and the views without a browser."""

import base64
import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import workbench
from tests.workbench.small_models import random_prompt, save_llama
from workbench import Prompt, Span
from workbench.analysis.state_maps import METRICS, StateMaps, state_maps
from workbench.faults import FAULTS
from workbench.plots import kernel_bars
from workbench.vision.videos import Video
from workbench.widgets import ComparisonView, HiddenStateMap, PatchView, RangeEditor
from workbench.widgets.comparison_view import NextTokens

TAPS = ("embed", "layers.*", "norm")


class Words:
    """A tokenizer for models without one: the text of an id is its number."""

    all_special_ids = (1, 2)

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = save_llama(tmp_path_factory.mktemp("llama"))
    model.__dict__["tokenizer"] = Words()
    return workbench.open_engine("numba", model)


@pytest.fixture
def maps(engine):
    prompt = random_prompt()
    return state_maps(engine, engine.trace(prompt, TAPS), engine.trace(Prompt(prompt.input_ids), TAPS), prompt)


def test_metrics_equal_values_computed_by_hand(engine, maps):
    prompt = random_prompt()
    here, plain = engine.trace(prompt, TAPS), engine.trace(Prompt(prompt.input_ids), TAPS)
    assert maps.taps == ["embed", "layers.0", "layers.1", "layers.2", "norm"]
    a, b = here["layers.1"][25].double(), plain["layers.1"][25].double()
    assert maps.values["change"][2, 25] == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-5)
    assert maps.values["cosine"][2, 25] == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-5)
    assert maps.values["norm"][2, 25] == pytest.approx(float(a.norm()), rel=1e-6)
    assert (maps.values["change"][:, :4] == 0).all()
    assert maps.bounds("change") == (1e-3, 3.0)
    low, high = maps.bounds("norm")
    assert maps.values["norm"].min() <= low < high <= maps.values["norm"].max()


def test_bounds_of_nan_and_constant_maps_are_not_empty():
    maps = StateMaps(
        ["a"], ["embed"], [], {"norm": np.array([[np.nan]], np.float32), "cosine": np.ones((1, 1), np.float32)}
    )
    for metric in maps.values:
        low, high = maps.bounds(metric)
        assert low < high


def test_lens_at_the_last_layer_equals_the_next_token(engine, maps):
    shares = []
    maps.add_lens(engine, shares.append)
    logits = engine.trace(random_prompt(), ["logits"])["logits"]
    best = logits.softmax(dim=-1).max(dim=-1)
    for row in (3, 4):  # the last layer, and after the final norm
        assert maps.words[row] == [str(int(token)) for token in best.indices]
        assert maps.values["lens"][row] == pytest.approx(best.values.numpy(), rel=1e-4)
    assert shares[-1] == 1.0


def test_neighbours_are_the_nearest_by_cosine(maps):
    states = maps.row_states(2)
    near = [float(torch.cosine_similarity(states[7], state, dim=0)) for state in states]
    near[7] = -2.0
    wanted = sorted(range(len(near)), key=lambda place: -near[place])[:4]
    assert [place for place, _ in maps.neighbours(2, 7, 4)] == wanted


def test_non_finite_states_can_be_shown(maps):
    states = maps.row_states(2).clone()
    states[3], states[4, 0], states[5] = torch.nan, torch.inf, 3e38
    view = HiddenStateMap(StateMaps(maps.tokens, maps.taps, maps.ranges, maps.values, row_states=lambda row: states))
    for token in (3, 4, 5, 6):
        view.chosen = [2, token]
        assert f"token {token}" in view.detail["title"]
    assert all(np.isfinite(near) for _, near in view.maps.neighbours(2, 6, 20))


def test_errors_of_a_comparison_are_added_to_the_map(engine, maps):
    comparison = workbench.check_engine(engine, random_prompt())
    maps.add_error(comparison)
    at = comparison.taps.index("layers.1")
    assert maps.values["error"][2] == pytest.approx(comparison.ratios[at].numpy(), rel=1e-5)
    with pytest.raises(ValueError, match="40 tokens: compare all"):
        maps.add_error(workbench.check_engine(engine, random_prompt(), positions=[3, 4]))
    with pytest.raises(ValueError, match="none of the taps"):
        maps.add_error(workbench.check_engine(engine, random_prompt(), ["logits"]))


def image_of(view):
    """The image in a view's mime bundle."""
    data, _ = view._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    return Image.open(io.BytesIO(base64.b64decode(data["image/png"])))


def test_map_shows_the_selected_metric_row_and_cell(engine, maps):
    view = HiddenStateMap(maps)
    assert np.frombuffer(view.values, np.float32).reshape(5, 40) == pytest.approx(maps.values["change"])
    view.metric = "norm"
    assert np.frombuffer(view.values, np.float32).reshape(5, 40) == pytest.approx(maps.values["norm"])
    assert view.scale == METRICS["norm"].scale
    assert view.bounds == pytest.approx(maps.bounds("norm"))
    view.row = 2
    assert view.row_values() == pytest.approx(maps.values["norm"][2])
    view.chosen = [2, 25]
    assert "layers.1, token 25" in view.detail["title"]
    assert sum(view.detail["counts"]) == 48
    assert len(view.detail["lines"]) == 7
    for nowhere in ([9, 0], [0, 40], [-1, 0], [1]):
        view.chosen = nowhere
        assert view.detail == {}
    view.metric = "colour"
    assert "no metric 'colour'" in view.message
    assert view.values == b""
    view.metric = "error"  # not computed: values of another metric must not appear under its name
    assert view.values == b""
    assert "yet" in view.message
    view.metric = "cosine"
    assert image_of(view).size[0] == 1100
    fallen = HiddenStateMap(maps, metric="error")
    assert (fallen.metric, fallen.scale, fallen.unit) == ("change", "log", "")
    with pytest.raises(ValueError, match="metric='heat'"):
        HiddenStateMap(maps, metric="heat")
    assert HiddenStateMap().figure() is not None


def test_patch_view_shows_every_kind_of_span():
    spans = [Span(grid=(2, 3), label="wide"), Span(grid=(2, 2, 2)), Span("audio"), Span(grid=(4,))]
    ranges = [(0, 6), (6, 14), (14, 19), (20, 24)]
    prompt = Prompt(range(30), [torch.zeros(b - a, 4) for a, b in ranges], ranges, spans)
    view = PatchView(prompt, [Image.new("RGB", (900, 600), "red"), None, None, Image.new("RGB", (10, 10))])
    found = [(item["label"], item["start"], item["lines"], item["columns"], item["image"]) for item in view.items]
    assert found == [
        ("wide", 0, 2, 3, 0),
        ("image 1, frame 0", 6, 2, 2, -1),
        ("image 1, frame 1", 10, 2, 2, -1),
        ("audio 2", 14, 1, 5, -1),  # one line along time
        ("image 3", 20, 1, 4, -1),  # one number is not a grid
    ]
    assert [item["range"] for item in view.items] == [0, 1, 1, 2, 3]
    assert max(Image.open(io.BytesIO(view.images[0])).size) == 512
    for odd in ((-2, -2), (3, 3), ()):  # grids that do not match the number of rows
        (item,) = PatchView(Prompt(range(9), [torch.zeros(4, 4)], [(2, 6)], [Span(grid=odd)])).items
        assert (item["lines"], item["columns"]) == (1, 4)
    view.show(prompt.replace(embedding_ranges=[(1, 7), *ranges[1:]]))
    assert view.items[0]["start"] == 1
    view.colour(np.arange(30, dtype=np.float32), "norm", (1.0, 30.0), "by norm")
    assert len(view.values) == 120
    assert image_of(view).size[0] == 1100
    *images, bar = view.figure().axes
    assert bar.get_ylabel() == "by norm"
    assert images[0].get_title() == "wide: tokens [1, 7)"
    painted = [axes.images[-1].get_array() for axes in images]
    assert painted[0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert [len(axes.images) for axes in images] == [2, 1, 1, 1, 1]  # colours are drawn with and without an image
    odd = np.full(30, 7, np.float32)
    odd[1:5] = 0, np.nan, np.inf, 99
    # On a logarithmic scale zero has no colour, and values beyond a limit have the limit's colour; infinity is above the scale, where the
    # colour of states that are not finite is.
    view.colour(odd, "norm", (1.0, 30.0))
    drawn = view.figure().axes[0].images[-1]
    assert drawn.get_array().filled(-1) == pytest.approx(np.array([[-1, -1, 61], [30, 7, 7]]), rel=1e-5)
    assert drawn.to_rgba(np.array([61.0]))[0, :3].tolist() == [1, 0, 1]
    for ends in ((0.0, 5.0), (5.0, 5.0)):
        view.colour(odd, "norm", ends)
        assert len(view.figure().axes) == 5
    view.clear()
    assert len(view.figure().axes) == 5
    assert PatchView(Prompt([1, 2])).items == []
    assert image_of(PatchView(Prompt([1, 2]))).size[0] == 1100


def test_comparison_view_shows_the_verdict(engine):
    prompt, view = random_prompt(), ComparisonView()
    with pytest.raises(RuntimeError, match="nothing has been compared"):
        view.figure()
    assert "image/png" not in view._repr_mimebundle_()[0]
    view.figure = lambda: Figure(figsize=(0.0, 0.0))
    with pytest.warns(UserWarning, match="no image is stored with this view"):
        assert "image/png" not in view._repr_mimebundle_()[0]
    del view.figure
    tokens = engine.model.tokens(prompt.input_ids)
    logits = {name: engine.trace(prompt, ["logits"])["logits"][-1] for name in ("reference", "engine")}
    words = NextTokens.of(engine.model, logits)
    assert words.runs["engine"] == words.runs["reference"]
    view.show(workbench.check_engine(engine, prompt), prompt, tokens, words)
    assert "noise" in view.banner.value
    assert view.map.chosen == []
    assert "range 1 (embeddings)" in view.spans.value
    assert words.runs["engine"][0][0] in view.words.value
    assert 'alt="error by layer' in view.chart.value
    faulty = workbench.check_engine(FAULTS["range +1"].inject(engine), prompt)
    view.show(faulty, prompt, tokens)
    assert "bug at tap embed, token 4" in view.banner.value
    assert view.map.chosen == [faulty.taps.index("embed"), 4]
    assert view.words.value == ""
    errors, ratios, _ = view.figure().axes
    assert "bug at tap embed" in errors.get_title(loc="left")
    assert "in noise floors" in ratios.get_title(loc="left")
    assert "image/png" in view._repr_mimebundle_()[0]
    view.say("plain", "wait")
    assert "wait" in view.banner.value
    part = workbench.check_engine(engine, prompt, positions=range(18, 30))
    view.show(part, prompt, tokens)
    assert view.map.spans == [[2, 11]]  # the second range, in columns of the traced positions


def test_range_editor_has_an_image(engine):
    assert image_of(RangeEditor(random_prompt(), engine.model)).size[0] == 1100
    long = RangeEditor(Prompt([5] * 3000, [torch.zeros(4, 48)], [(2000, 2004)]), engine.model)
    assert image_of(long).size[1] < 1000  # only the beginning; `figure` draws all of it


def test_kernel_bars_show_the_rows_of_the_report():
    rows = [
        {"shape": [1, 2], "kernel": "hopper, spans", "tflops": 5.0},
        {"shape": [1, 2], "kernel": "flash", "tflops": 2.0},
        {"shape": [3, 4], "kernel": "ours", "tflops": 7.0},
    ]
    left, right = kernel_bars(rows, "tflops", "TFLOP/s", {(1, 2): "small", (3, 4): "large"}).axes
    assert [bar.get_width() for bar in left.patches] == [2.0, 5.0]
    assert [label.get_text() for label in left.get_yticklabels()] == ["flash", "hopper, spans"]
    assert right.get_title(loc="left") == "large, TFLOP/s"
    with pytest.raises(ValueError, match=r"no row of shape \(9, 9\)"):
        kernel_bars(rows, "tflops", "TFLOP/s", {(9, 9): "none"})


def frames(count):
    """A video whose frame k has the grey value 20 k."""
    return Video.of_frames(np.stack([np.full((8, 12, 3), 20 * k, np.uint8) for k in range(count)]), 2.0)


def grey_of(view, item):
    return np.asarray(Image.open(io.BytesIO(view.images[item["image"]])))[0, 0, 0]


def test_a_video_is_a_strip_of_its_frames():
    """Six frames that the tower merges in pairs: three grids, in one range or in three; text and an image beside it."""
    rows = torch.zeros(6, 4)
    one = Prompt(range(40), [torch.zeros(18, 4)], [(6, 24)], [Span("video", (3, 2, 3), label="video 0")])
    parts = [Span("video", (1, 2, 3), label=f"video 0, part {k} of 3") for k in (1, 2, 3)]
    three = Prompt(range(40), [rows] * 3, [(2, 8), (12, 18), (22, 28)], parts)
    after = Prompt(
        range(40), [*[rows] * 3, torch.zeros(4, 4)], [(2, 8), (12, 18), (22, 28), (30, 34)], [*parts, Span(grid=(2, 2))]
    )
    picture = Image.new("RGB", (6, 6), (250, 250, 250))
    for prompt, media in ((one, [frames(6)]), (three, [frames(6)]), (after, [frames(6), picture])):
        view = PatchView(prompt, media)
        shown = [grey_of(view, item) for item in view.items]
        assert shown == [0, 40, 80, 250][: len(shown)]
        assert [item["start"] for item in view.items][1:3] == ([12, 18] if prompt is one else [12, 22])
        assert view.figure() is not None
        moved = prompt.replace(embedding_ranges=[(a + 1, b + 1) for a, b in prompt.embedding_ranges])
        view.show(moved)
        assert [grey_of(view, item) for item in view.items] == shown


def test_a_video_that_was_pooled_over_time_has_no_pictures():
    prompt = Prompt(range(40), [torch.zeros(25, 4)], [(6, 31)], [Span("video", (5, 5), label="video 0")])
    (item,) = PatchView(prompt, [frames(6)]).items
    assert item["image"] == -1
    (item,) = PatchView(prompt, [frames(1)]).items
    assert item["image"] == 0
