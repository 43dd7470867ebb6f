"""The explorer in a browser: linked views, moved ranges, updates of map and verdict, errors shown in the view."""

from __future__ import annotations

import time

import pytest

from tests.browser.conftest import ARTIFACTS, serious
from tests.browser.test_notebooks import SECOND, assert_no_errors, find, go_dark, open_and_run, wait_idle

pytestmark = pytest.mark.browser
NOTEBOOK = "explorer.ipynb"


def open_explorer(page, lab):
    open_and_run(page, lab, NOTEBOOK)
    wait_idle(page)
    explorer = find(page, ".workbench-explorer")
    explorer.locator("text=noise: at most").wait_for(timeout=90 * SECOND)
    return explorer


def paints(view):
    return int(view.locator(".wb-map").first.evaluate("map => map.dataset.paints"))


def settle(page, view):
    """Wait until the map is no longer repainted and the verdict is shown."""
    seen = -1
    while seen != paints(view):
        seen = paints(view)
        page.wait_for_timeout(600)
    view.locator("text=noise: at most").wait_for(timeout=90 * SECOND)


def hold_mouse_over(page, node, x, y):
    """Move the mouse to (x, y), given as fractions of the node's width and height."""
    node.scroll_into_view_if_needed()
    box = node.bounding_box()
    page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y)


def luminance_of_names(explorer):
    """Mean luminance of the map's layer names, 0 to 255; they are drawn on a canvas, so no style sheet adapts them."""
    return explorer.locator(".wb-map .wb-cells").first.evaluate(
        """canvas => {
            const { data } = canvas.getContext('2d').getImageData(0, 0, 76, canvas.height);
            const solid = [];
            for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 128) solid.push((data[i] + data[i + 1] + data[i + 2]) / 3);
            return solid.reduce((a, b) => a + b) / solid.length;
        }"""
    )


def read(view, which=".wb-map"):
    return view.locator(f"{which} .wb-read").first


def test_views_are_linked_and_a_moved_range_gives_a_new_map(page, lab, capsys):
    explorer = open_explorer(page, lab)
    explorer.locator("text=blue 7, green 5").first.wait_for(timeout=20 * SECOND)
    page.screenshot(path=ARTIFACTS / "explorer.png")
    hints = explorer.locator(".wb-hovered")

    # Patch -> token -> column.
    hold_mouse_over(page, explorer.locator(".wb-item .wb-above").nth(1), 0.5, 0.5)
    read(explorer, ".wb-patches").locator("text=patch (3, 3) of image 1 is token 76").wait_for(timeout=10 * SECOND)
    read(explorer).locator("text=token 76").wait_for(timeout=10 * SECOND)
    # Token -> patch.
    hold_mouse_over(page, explorer.locator("[data-token='9']"), 0.5, 0.5)
    read(explorer, ".wb-patches").locator("text=patch (0, 6) of image 0 is token 9").wait_for(timeout=10 * SECOND)
    assert hints.count() == 1
    # Column -> token and patch; a click opens the state.
    cells = explorer.locator(".wb-map .wb-above").first
    width = cells.bounding_box()["width"]
    place = (
        82 + (width - 90) * 60.5 / 113
    ) / width  # the plot begins 82 points from the left and ends 8 from the right
    hold_mouse_over(page, cells, place, 0.4)
    read(explorer).locator("text=token 60").wait_for(timeout=10 * SECOND)
    read(explorer, ".wb-patches").locator("text=patch (1, 1) of image 1").wait_for(timeout=10 * SECOND)
    page.mouse.down()
    page.mouse.up()
    explorer.locator(".wb-detail-title").first.locator("text=576 numbers").wait_for(timeout=10 * SECOND)
    assert explorer.locator(".wb-neighbours").first.locator("tr").count() >= 7
    page.screenshot(path=ARTIFACTS / "explorer_linked.png")
    explorer.locator(".wb-detail button").first.click()

    # Move the range by keyboard and time each new map.
    seconds = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft"):
        settle(page, explorer)
        before = paints(explorer)
        handle = explorer.locator("[data-key='1-both']")
        handle.focus()
        started = time.perf_counter()
        handle.press(key)
        page.wait_for_function(
            "before => Number(document.querySelector('.wb-map').dataset.paints) > before",
            arg=before,
            timeout=20 * SECOND,
        )
        seconds.append(time.perf_counter() - started)
    with capsys.disabled():
        print(f"\nkey to new map, 113 tokens: {sorted(seconds)[1] * 1000:.0f} ms (median of {len(seconds)})")

    # Overlapping ranges are refused: the view shows the error and keeps the comparison until the ranges are reset.
    explorer.locator("[data-key='0-both']").press("ArrowRight")
    explorer.locator("text=EmbeddingRangeError").wait_for(timeout=20 * SECOND)
    explorer.locator("text=the last comparison is shown below").wait_for(timeout=20 * SECOND)
    page.screenshot(path=ARTIFACTS / "explorer_overlap.png")
    explorer.locator("button", has_text="Reset ranges").click()
    explorer.locator("text=Ranges unchanged").wait_for(timeout=30 * SECOND)
    settle(page, explorer)

    # Other metrics: missing values are computed.
    colours = explorer.locator(".wb-map select").first
    colours.select_option("lens")
    explorer.locator(".wb-map").first.locator("text=0 to 1").wait_for(timeout=60 * SECOND)  # limits of its colour scale
    hold_mouse_over(page, cells, 1 - 9.5 / width, 0.06)
    read(explorer).locator('text=reads as "blue"').wait_for(timeout=60 * SECOND)
    page.screenshot(path=ARTIFACTS / "explorer_lens.png")
    settle(page, explorer)
    colours.select_option("error")
    page.wait_for_timeout(1000)
    hold_mouse_over(page, cells, place, 0.4)
    read(explorer).locator("text=noise floors").wait_for(timeout=60 * SECOND)
    verdict = explorer.locator(".workbench-verdict")
    verdict.scroll_into_view_if_needed()
    verdict.locator("text=Next token").wait_for(timeout=20 * SECOND)
    assert verdict.locator("text=image").count() >= 2  # spans by kind
    page.screenshot(path=ARTIFACTS / "explorer_verdict.png")
    assert_no_errors(page)


def test_large_map_repaints_and_explorer_works_without_images(page, lab, capsys):
    open_and_run(page, lab, "large_map.ipynb")
    wait_idle(page)
    large = find(page, ".large-map .wb-map")
    page.wait_for_function("() => document.querySelector('.large-map .wb-map')?.dataset.paints", timeout=30 * SECOND)
    times = []
    for name in ("norm", "change", "norm"):
        before = large.evaluate("map => map.dataset.paints")
        large.locator("select").select_option(name)
        page.wait_for_function(
            "before => document.querySelector('.large-map .wb-map').dataset.paints !== before",
            arg=before,
            timeout=20 * SECOND,
        )
        page.wait_for_timeout(300)
        times.append(float(large.evaluate("map => map.dataset.paintMilliseconds")))
    with capsys.disabled():
        print(f"\n32 x 4,096 map painted in {sorted(times)[1]:.1f} ms")
    page.screenshot(path=ARTIFACTS / "large_map.png")
    text = find(page, ".text-only")
    text.locator("text=No range").wait_for(timeout=60 * SECOND)
    text.locator("button", has_text="Add range").click()
    text.locator("text=0 input_embeddings but 1 embedding_ranges").first.wait_for(timeout=20 * SECOND)
    text.locator("button", has_text="Undo").click()
    text.locator("text=No range").wait_for(timeout=60 * SECOND)
    assert_no_errors(page)


def test_why_panel_colours_the_views_and_the_tap_map_chooses_rows(page, lab):
    explorer = open_explorer(page, lab)
    settle(page, explorer)
    explorer.locator("text=Why this answer").click()
    token = explorer.locator(".wb-answer-token").first
    token.wait_for(timeout=30 * SECOND)
    assert explorer.locator(".wb-answer-token").count() == 7
    # Pointing at a token shows its layers; Enter pins it, and its attention colours images, tokens and map.
    token.hover()
    explorer.locator(".wb-answer .wb-read").locator('text="blue" was said').wait_for(timeout=10 * SECOND)
    assert explorer.locator(".wb-lens tbody tr").count() == 32
    token.focus()
    token.press("ArrowRight")
    token.press("Enter")  # the focus has moved to the second token, and this presses the first again
    assert token.get_attribute("aria-pressed") == "true"
    read(explorer, ".wb-patches").locator("text=attention of 'blue'").wait_for(timeout=20 * SECOND)
    underlined = "span => [...document.querySelectorAll('.wb-token')].some(t => t.style.boxShadow)"
    page.wait_for_function(underlined, timeout=10 * SECOND)
    assert explorer.locator(".wb-map select").first.input_value() == "read"
    page.screenshot(path=ARTIFACTS / "explorer_why.png")
    explorer.locator(".wb-answer").scroll_into_view_if_needed()
    page.screenshot(path=ARTIFACTS / "explorer_answer.png")
    # Ablation.
    explorer.locator("button", has_text="what it rests on").click()
    explorer.locator("text=changes below").wait_for(timeout=60 * SECOND)
    read(explorer, ".wb-patches").locator("text=nats that 'blue' loses").wait_for(timeout=20 * SECOND)
    page.screenshot(path=ARTIFACTS / "explorer_rests.png")
    # The map of attention outputs, chosen by keyboard in the tap map.
    layer = explorer.locator("[data-tap='layers.29']")
    explorer.locator(".wb-tap[aria-checked='true']").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_function("() => document.activeElement.dataset.tap === 'layers.29'", timeout=5 * SECOND)
    layer.press("ArrowLeft")
    page.wait_for_function("() => document.activeElement.dataset.tap === 'layers.29.mlp'", timeout=5 * SECOND)
    page.keyboard.press("ArrowLeft")
    read(explorer).scroll_into_view_if_needed()
    cells = explorer.locator(".wb-map .wb-above").first
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        hold_mouse_over(page, cells, 0.5, 0.1)
        hold_mouse_over(page, cells, 0.55, 0.07)
        page.wait_for_timeout(300)
        if ".attention" in read(explorer).inner_text():
            break
    assert ".attention" in read(explorer).inner_text()
    page.screenshot(path=ARTIFACTS / "explorer_taps.png")
    assert_no_errors(page)
    assert serious(page, ".workbench-explorer") == []
    go_dark(page)
    page.wait_for_timeout(500)
    assert serious(page, ".workbench-explorer") == []
    page.screenshot(path=ARTIFACTS / "explorer_why_dark.png")


def test_axe_finds_no_serious_violation_in_light_or_dark_theme(page, lab):
    """Roles, names and contrast, for screen readers and users with low vision."""
    explorer = open_explorer(page, lab)
    assert not explorer.locator("button", has_text="Later images").is_visible()  # two images need no pages
    assert luminance_of_names(explorer) < 128
    assert serious(page, ".workbench-explorer") == []
    go_dark(page)
    explorer.scroll_into_view_if_needed()
    page.wait_for_timeout(2500)
    page.screenshot(path=ARTIFACTS / "explorer_dark.png")
    assert luminance_of_names(explorer) > 128
    assert serious(page, ".workbench-explorer") == []


def test_saved_explorer_reopens_and_restarts(page, lab):
    """A saved notebook shows its last state without a kernel, by default; a restart creates the explorer in a new kernel."""
    explorer = open_explorer(page, lab)
    handle = explorer.locator("[data-key='1-both']")
    handle.focus()
    handle.press("ArrowRight")
    explorer.locator("text=Ranges moved").wait_for(timeout=30 * SECOND)
    explorer.locator("text=noise: at most").wait_for(timeout=60 * SECOND)
    page.wait_for_timeout(2000)
    page.locator(".jp-NotebookPanel [data-command='docmanager:save']").first.click()
    page.wait_for_timeout(3000)
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_text("Shut Down Kernel", exact=True).click()
    page.wait_for_timeout(2000)
    page.reload()
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=120 * SECOND)
    explorer = find(page, ".workbench-explorer", 60)
    explorer.locator("text=Ranges moved").wait_for(timeout=30 * SECOND)
    assert paints(explorer) >= 1
    assert explorer.locator("[data-key='1-both']").get_attribute("aria-valuenow") == "53"
    page.screenshot(path=ARTIFACTS / "explorer_reopened.png")
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_text("Restart Kernel and Run All Cells…", exact=True).click()
    page.locator(".jp-Dialog button", has_text="Restart").last.click()
    page.wait_for_timeout(3000)
    wait_idle(page)
    explorer = find(page, ".workbench-explorer")
    explorer.locator("text=Ranges unchanged").wait_for(timeout=90 * SECOND)
    assert_no_errors(page)


def test_explorer_follows_keys_in_notebook_7(page, notebook7):
    page.goto(f"{notebook7}/notebooks/notebooks/{NOTEBOOK}")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120 * SECOND)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=120 * SECOND)
    page.wait_for_timeout(2000)
    own = list(page.console_errors)  # Notebook 7.6 logs an error about a setting's schema at startup
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    explorer = page.locator(".workbench-explorer").first
    explorer.wait_for(timeout=180 * SECOND)
    wait_idle(page)
    explorer.locator("text=noise: at most").wait_for(timeout=90 * SECOND)
    explorer.locator(".wb-editor").scroll_into_view_if_needed()
    handle = explorer.locator("[data-key='1-both']")
    handle.focus()
    for key in ("d", "d", "b", "x", "Enter"):  # shortcuts of the notebook if the view did not keep its keys
        handle.press(key)
    menu = explorer.locator(".widget-dropdown", has_text="Fault").locator("select")
    menu.focus()
    for key in ("x", "d", "d"):
        page.keyboard.press(key)
    handle.press("ArrowRight")
    page.screenshot(path=ARTIFACTS / "explorer_notebook7.png")
    explorer.locator("text=Ranges moved").wait_for(timeout=30 * SECOND)
    assert page.console_errors == own
    assert page.outside == []
