"""Figures at real sizes: no token hides another, whatever characters tokens and names contain."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workbench.analysis.answer_lens import AnswerLens
from workbench.analysis.patching import PatchEffects
from workbench.plots import step_roofline, step_timeline, to_png, token_strip
from workbench.plots.answer_lens import answer_lens_figure
from workbench.plots.columns import tokens_per_column, worst_per_column
from workbench.plots.engine_floors import floors_by_tap
from workbench.plots.heat_map import hidden_state_map
from workbench.plots.patches import PatchGrid, grids_figure
from workbench.plots.patching import patching_figure
from workbench.plots.style import FAILED as FAILED_COLOUR
from workbench.plots.tap_map import tap_map_figure
from workbench.plots.visible_text import drawable, escaped, fonts, label, width

TAPS = [f"layers.{number}" for number in range(40)]
MAGENTA, FAILED = (255, 0, 255), (0xC2, 0x18, 0x5B)


def pixels(figure):
    return np.asarray(Image.open(BytesIO(to_png(figure))).convert("RGB")).astype(int)


def drawn(values, kind="change", failures=(), bounds=(1e-3, 3)):
    tokens = ["x"] * values.shape[1]
    return pixels(hidden_state_map(values, TAPS[: len(values)], tokens, (), kind, bounds, failures))


@pytest.mark.parametrize("tokens", [2000, 8192, 32768])
@pytest.mark.parametrize(
    ("kind", "usual", "wrong"), [("change", 0.0, 1.0), ("cosine", 1.0, -1.0), ("error", 0.2, 60.0)]
)
def test_one_wrong_token_is_drawn_at_every_length(tokens, kind, usual, wrong):
    bounds = {"change": (1e-3, 3), "cosine": (0, 1), "error": (1 / 64, 64)}[kind]
    values = np.full((40, tokens), usual, np.float32)
    clean = drawn(values, kind, (), bounds)
    lost = 0
    for at in range(tokens // 2, tokens // 2 + 2):
        one = values.copy()
        one[:, at] = wrong
        body = (drawn(one, kind, (), bounds) != clean).any(axis=2)[60:330, 60:1040]
        lost += not body.any(axis=1).mean() > 0.9
    assert lost == 0


def test_the_title_says_how_many_tokens_share_a_column():
    figure = hidden_state_map(np.ones((2, 8192), np.float32), TAPS[:2], ["x"] * 8192, (), "cosine", (0, 1))
    assert "14 tokens per column: the lowest is drawn" in figure.axes[0].get_title(loc="left")


def test_a_failure_is_marked_above_the_map():
    values = np.full((40, 32768), 0.2, np.float32)
    body = drawn(values, "error", [20000], (1 / 64, 64))
    at = (np.abs(body - FAILED).sum(axis=2) < 30).nonzero()
    assert len(at[0]) > 5
    assert at[0].max() < 60


@pytest.mark.parametrize(("kind", "bad"), [("change", np.inf), ("error", np.inf), ("cosine", -np.inf)])
def test_a_state_that_is_not_finite_has_a_colour_of_its_own(kind, bad):
    bounds = {"change": (1e-3, 3), "cosine": (0, 1), "error": (1 / 64, 64)}[kind]
    values = np.full((40, 8192), 0.5, np.float32)
    values[:, 7000] = bad
    assert ((drawn(values, kind, (), bounds) == MAGENTA).all(axis=2)).sum() > 100
    # NaN, not computed, is white.
    values[:, 7000] = 0.5
    values[:, :100] = np.nan
    assert not (drawn(values, kind, (), bounds) == MAGENTA).all(axis=2).any()


def test_worst_of_columns_against_brute_force():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(3, 1003)).astype(np.float32)
    values[1, 17] = np.nan
    for lowest in (False, True):
        found = worst_per_column(values, 10, lowest)
        pick = np.nanmin if lowest else np.nanmax
        assert found.shape == (3, 101)
        assert all(found[row, at] == pick(values[row, 10 * at : 10 * at + 10]) for row in range(3) for at in range(101))
    assert (tokens_per_column(600), tokens_per_column(601), tokens_per_column(0)) == (1, 2, 1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\u202e612.3", "<U+202E>612.3"),
        ("a\u200db", "a<U+200D>b"),
        ("\x1b[31m", "<U+001B>[31m"),
        ("\u00a0", "<U+00A0>"),
        ("\u3000", "<U+3000>"),
        ("\u0301", "◌\u0301"),
        ("日本", "日本"),
        ("a\nb\t", "a\nb\t"),
        ("", ""),
    ],
)
def test_invisible_characters_are_escaped(text, shown):
    assert escaped(text) == shown


def test_labels_are_short_and_never_cut_an_escape_of_matplotlib():
    assert label("") == "∅"
    assert label(" the\n") == "·the↵"
    assert len(label("e" * 500)) == 14
    assert drawable(label("x" * 12 + "$y$")) == "x" * 12 + r"\$…"
    assert width("日本a") == 5


def test_characters_without_a_font_are_named():
    if len(fonts()) == 1:
        assert drawable("中") == "<U+4E2D>"
    assert drawable("é") == "é"


def test_dollars_and_hidden_characters_are_drawn(recwarn):
    token_strip(["$x", "y$", "$", "\u202e", "中", "\ud800"], [(1, 2)]).draw_without_rendering()
    assert [str(each.message) for each in recwarn if "Glyph" in str(each.message)] == []


def test_fifty_grids_are_laid_out_in_rows():
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    grids = [PatchGrid(f"image {number}", 7, 7, None, np.full((7, 7), number / 50)) for number in range(50)]
    figure = grids_figure(grids, Normalize(0, 1), colormaps["viridis"])
    width_inches, height = figure.get_size_inches()
    assert (width_inches, height < 25) == (11, True)
    assert pixels(figure).shape[1] == 1100


def test_engines_side_by_side_show_which_one_leaves_the_band():

    taps = ["embed", *(f"layers.{number}" for number in range(30)), "norm", "logits"]
    engines = {
        "a, float32": (taps, [1.0] * 33),
        "a, bfloat16": (taps, [0.0] * 33),
        "b, float32": (taps[-2:], [20.0, 900.0]),
    }
    axes = floors_by_tap(engines, 8.0).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["b, float32"].get_color() == FAILED_COLOUR
    assert lines["a, float32"].get_color() == lines["a, bfloat16"].get_color() != FAILED_COLOUR
    assert lines["a, float32"].get_linestyle() != lines["a, bfloat16"].get_linestyle()
    assert list(lines["b, float32"].get_xdata()) == [31, 32]
    assert min(lines["a, bfloat16"].get_ydata()) > 0  # an exact tap is drawn on the logarithmic scale, too
    assert floors_by_tap({}, 8.0).axes


def test_a_grid_of_patches_shows_what_was_run():
    values = np.array([[0.0, 2.0], [np.nan, 1.0]])
    effects = PatchEffects(
        (1, 2), ("a", "b$"), ("layers.0", "layers.1"), ("image 0", "text"), ((0,), (1,)), 0.0, 2.0, values, False
    )
    figure = patching_figure(effects)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0%", "100%", "50%"]
    assert "cancelled" in axes.get_title()
    pixels(figure)  # names are escaped
    deep = PatchEffects(
        (1, 2),
        ("a", "b"),
        tuple(f"layers.{n}" for n in range(80)),
        ("text",),
        ((0,),),
        0.0,
        1.0,
        np.zeros((80, 1)),
        True,
    )
    assert len(patching_figure(deep).axes[0].get_yticklabels()) == 40


def test_the_diagram_of_a_deep_model_leaves_the_middle_out():
    layers = [{"number": n, "taps": [f"layers.{n}.attention", f"layers.{n}"], "about": ""} for n in range(40)]
    figure = tap_map_figure(layers, ["embed", "norm"], ["image $0 [3, 52)"], "layers.39")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"layers.0", "layers.39", "..."} <= set(texts)
    assert "layers.20" not in texts
    assert (pixels(figure) == (0x19, 0x76, 0xD2)).all(axis=-1).any()  # the chosen tap is filled


def test_the_lens_of_an_answer_is_drawn_with_the_last_words_in_bold():
    words = [["x", "y"], ["blue", "7"]]
    chances = np.array([[0.1, 0.2], [0.9, 0.8]])
    likeliest = np.array([[5, 6], [1, 2]])
    lens = AnswerLens(
        (1, 2), ("blue", "7"), ("embed", "norm"), words, likeliest, chances, chances, ("sinks", "text"), None, None
    )
    texts = answer_lens_figure(lens).axes[0].texts
    assert {text.get_text() for text in texts if text.get_weight() == "bold"} == {"blue", "7"}


def test_a_decode_step_is_drawn_from_its_records():
    """Every kernel is a bar in the lane of its kind; the roofline starts with the step of one request."""
    folder = Path(__file__).parents[2] / "data" / "bench"
    step = json.loads((folder / "step-16-h100.json").read_text())
    whole = step_timeline(step).axes[0]
    assert sum(len(bars.get_paths()) for bars in whole.collections) == len(step["kernels"])
    served = json.loads((folder / "serving-h100.json").read_text())
    axes = step_roofline(served).axes[0]
    floor, *engines = axes.lines
    assert len(engines) == 2
    for line in engines:
        assert (line.get_ydata() > floor.get_ydata()).all()  # nothing reads faster than a copy
    assert engines[1].get_ydata()[0] == pytest.approx(1e3 / served["engines"]["numba"]["decode, 1 at once"])
    del served["weight bytes"]
    with pytest.raises(ValueError, match="'weight bytes'"):
        step_roofline(served)
