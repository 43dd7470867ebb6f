"""The whole bench in one cell, under a hand: linked views, a range dragged, map and verdict after it, errors in the view."""

from __future__ import annotations

import time

import pytest

from .conftest import ARTIFACTS
from .test_notebooks import SECOND, check_quiet, find, go_dark, open_and_run, wait_idle

pytestmark = pytest.mark.browser
NOTEBOOK = "explorer.ipynb"


def open_bench(page, lab):
    open_and_run(page, lab, NOTEBOOK)
    wait_idle(page)
    bench = find(page, ".workbench-explorer")
    bench.locator("text=noise: at most").wait_for(timeout=90 * SECOND)
    return bench


def paints(view):
    return int(view.locator(".wb-map").first.evaluate("map => map.dataset.paints"))


def settle(page, view):
    """Wait until the map is painted no more and the verdict stands."""
    seen = -1
    while seen != paints(view):
        seen = paints(view)
        page.wait_for_timeout(600)
    view.locator("text=noise: at most").wait_for(timeout=90 * SECOND)


def hold_mouse_over(page, node, x, y):
    """The pointer at a share of a node's width and height."""
    node.scroll_into_view_if_needed()
    box = node.bounding_box()
    page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y)


def luminance_of_names(bench):
    """How light the map's layer names are, 0 to 255: they are painted, so no style sheet follows a change of theme."""
    return bench.locator(".wb-map .wb-cells").first.evaluate(
        """canvas => {
            const { data } = canvas.getContext('2d').getImageData(0, 0, 76, canvas.height);
            const solid = [];
            for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 128) solid.push((data[i] + data[i + 1] + data[i + 2]) / 3);
            return solid.reduce((a, b) => a + b) / solid.length;
        }"""
    )


def read(view, which=".wb-map"):
    return view.locator(f"{which} .wb-read").first


def test_views_are_linked_and_a_dragged_range_gives_a_new_map(page, lab, capsys):
    bench = open_bench(page, lab)
    bench.locator("text=blue 7, green 5").first.wait_for(timeout=20 * SECOND)
    page.screenshot(path=ARTIFACTS / "explorer.png")
    hints = bench.locator(".wb-hovered")

    # Patch -> token -> column.
    hold_mouse_over(page, bench.locator(".wb-item .wb-above").nth(1), 0.5, 0.5)
    read(bench, ".wb-patches").locator("text=patch (3, 3) of image 1 is token 76").wait_for(timeout=10 * SECOND)
    read(bench).locator("text=token 76").wait_for(timeout=10 * SECOND)
    # Token -> patch.
    hold_mouse_over(page, bench.locator("[data-token='9']"), 0.5, 0.5)
    read(bench, ".wb-patches").locator("text=patch (0, 6) of image 0 is token 9").wait_for(timeout=10 * SECOND)
    assert hints.count() == 1
    # Column -> token and patch; a click opens the state.
    cells = bench.locator(".wb-map .wb-above").first
    width = cells.bounding_box()["width"]
    place = (
        82 + (width - 90) * 60.5 / 113
    ) / width  # the plot begins 82 points from the left and ends 8 from the right
    hold_mouse_over(page, cells, place, 0.4)
    read(bench).locator("text=token 60").wait_for(timeout=10 * SECOND)
    read(bench, ".wb-patches").locator("text=patch (1, 1) of image 1").wait_for(timeout=10 * SECOND)
    page.mouse.down()
    page.mouse.up()
    bench.locator(".wb-detail-title").first.locator("text=576 numbers").wait_for(timeout=10 * SECOND)
    assert bench.locator(".wb-neighbours").first.locator("tr").count() >= 7
    page.screenshot(path=ARTIFACTS / "explorer_linked.png")
    bench.locator(".wb-detail button").first.click()

    # By keyboard, as fast as the map follows.
    seconds = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft"):
        settle(page, bench)
        before = paints(bench)
        handle = bench.locator("[data-key='1-both']")
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

    # An overlap does not run: the view says so and stays; ranges back, and all is well.
    bench.locator("[data-key='0-both']").press("ArrowRight")
    bench.locator("text=EmbeddingRangeError").wait_for(timeout=20 * SECOND)
    bench.locator("text=what was compared last").wait_for(timeout=20 * SECOND)
    page.screenshot(path=ARTIFACTS / "explorer_overlap.png")
    bench.locator("button", has_text="Ranges back").click()
    bench.locator("text=Ranges where they were built").wait_for(timeout=30 * SECOND)
    settle(page, bench)

    # Other colours: what is missing is computed.
    colours = bench.locator(".wb-map select").first
    colours.select_option("lens")
    bench.locator(".wb-map").first.locator("text=0 to 1").wait_for(timeout=60 * SECOND)  # the ends of its colours
    hold_mouse_over(page, cells, 1 - 12 / width, 0.06)
    read(bench).locator('text=reads as "blue"').wait_for(timeout=60 * SECOND)
    page.screenshot(path=ARTIFACTS / "explorer_lens.png")
    settle(page, bench)
    colours.select_option("error")
    page.wait_for_timeout(1000)
    hold_mouse_over(page, cells, place, 0.4)
    read(bench).locator("text=noise floors").wait_for(timeout=60 * SECOND)
    verdict = bench.locator(".workbench-verdict")
    verdict.scroll_into_view_if_needed()
    verdict.locator("text=Next token").wait_for(timeout=20 * SECOND)
    assert verdict.locator("text=image").count() >= 2  # spans by kind
    page.screenshot(path=ARTIFACTS / "explorer_verdict.png")
    check_quiet(page)


def test_a_large_map_and_a_bench_without_pictures(page, lab, capsys):
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
    check_quiet(page)


def test_axe_finds_nothing_serious_in_light_and_dark(page, lab):
    """Roles, names, contrast: what a screen reader or weak eyes need."""
    from axe_playwright_python.sync_playwright import Axe

    def serious():
        return [
            f"{each['id']}: {each['help']} ({node['html'][:160]})"
            for each in Axe().run(page, context=".workbench-explorer").response["violations"]
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]

    bench = open_bench(page, lab)
    assert luminance_of_names(bench) < 128
    assert serious() == []
    go_dark(page)
    bench.scroll_into_view_if_needed()
    page.wait_for_timeout(2500)
    page.screenshot(path=ARTIFACTS / "explorer_dark.png")
    assert luminance_of_names(bench) > 128
    assert serious() == []


def test_saved_reopened_and_restarted(page, lab):
    """A saved notebook opens as it was left, without its kernel; running it again brings the bench back, in a new kernel."""
    bench = open_bench(page, lab)
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.get_by_text("Save Widget State Automatically", exact=True).click()
    handle = bench.locator("[data-key='1-both']")
    handle.focus()
    handle.press("ArrowRight")
    bench.locator("text=Ranges moved").wait_for(timeout=30 * SECOND)
    bench.locator("text=noise: at most").wait_for(timeout=60 * SECOND)
    page.wait_for_timeout(2000)
    page.locator(".jp-NotebookPanel [data-command='docmanager:save']").first.click()
    page.wait_for_timeout(3000)
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_text("Shut Down Kernel", exact=True).click()
    page.wait_for_timeout(2000)
    page.reload()
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=120 * SECOND)
    bench = find(page, ".workbench-explorer", 60)
    bench.locator("text=Ranges moved").wait_for(timeout=30 * SECOND)
    assert paints(bench) >= 1
    assert bench.locator("[data-key='1-both']").get_attribute("aria-valuenow") == "53"
    page.screenshot(path=ARTIFACTS / "explorer_reopened.png")
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_text("Restart Kernel and Run All Cells…", exact=True).click()
    page.locator(".jp-Dialog button", has_text="Restart").last.click()
    page.wait_for_timeout(3000)
    wait_idle(page)
    bench = find(page, ".workbench-explorer")
    bench.locator("text=Ranges where they were built").wait_for(timeout=90 * SECOND)
    check_quiet(page)


def test_in_notebook_7(page, notebook7):
    page.goto(f"{notebook7}/notebooks/notebooks/{NOTEBOOK}")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120 * SECOND)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=120 * SECOND)
    page.wait_for_timeout(2000)
    own = list(page.console_errors)  # Notebook 7.6 complains about a setting's schema while it starts
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    bench = page.locator(".workbench-explorer").first
    bench.wait_for(timeout=180 * SECOND)
    wait_idle(page)
    bench.locator("text=noise: at most").wait_for(timeout=90 * SECOND)
    bench.locator(".wb-editor").scroll_into_view_if_needed()
    handle = bench.locator("[data-key='1-both']")
    handle.focus()
    handle.press("ArrowRight")  # a shortcut of the notebook's own, where the view does not keep it from there
    page.screenshot(path=ARTIFACTS / "explorer_notebook7.png")
    bench.locator("text=Ranges moved").wait_for(timeout=30 * SECOND)
    assert page.console_errors == own
    assert page.outside == []
