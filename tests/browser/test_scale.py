"""Views at real sizes in a browser: 8,192 tokens, 50 ranges and images, keys, a held range, a kernel that has ended."""

from __future__ import annotations

import pytest

from tests.browser.conftest import ARTIFACTS, end_kernels, serious
from tests.browser.test_notebooks import SECOND, assert_no_errors, find, go_dark, open_and_run, wait_idle

pytestmark = pytest.mark.browser
NOTEBOOK = "scale.ipynb"
VIEWS = (".scale-map", ".scale-editor", ".scale-patches", ".scale-rows", ".workbench-plan")


def cells(page):
    return page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.cells.length")


def reddest(canvas, x):
    """How red the map is around a place, given as a fraction of its width: the largest red minus blue of any pixel."""
    return canvas.evaluate(
        """(canvas, x) => {
            const at = Math.round(canvas.width * x);
            const { data } = canvas.getContext('2d').getImageData(at - 3, Math.round(canvas.height * 0.2), 7, 30);
            let most = -255;
            for (let i = 0; i < data.length; i += 4) most = Math.max(most, data[i] - data[i + 2]);
            return most;
        }""",
        x,
    )


def test_views_of_8192_tokens_and_50_images(page, lab):
    open_and_run(page, lab, NOTEBOOK)
    wait_idle(page)

    # One wrong token of 8,192 is drawn, marked above the map, and named.
    large = find(page, ".scale-map")
    canvas = large.locator(".wb-cells")
    width = canvas.bounding_box()["width"]
    place = (82 + (width - 90) * 5001.5 / 8192) / width
    assert reddest(canvas, place) > 80
    assert reddest(canvas, place - 0.05) < 0
    assert "tokens per column, the largest is shown" in large.locator(".wb-keytext").inner_text()
    page.screenshot(path=ARTIFACTS / "scale_map.png")

    # The editor opens at the first range; every range is reachable by Tab and by the menu.
    editor = find(page, ".scale-editor")
    strip = editor.locator(".wb-strip")
    assert strip.evaluate("strip => strip.scrollTop") > 1000
    assert editor.locator("[data-key$='-both'][tabindex='0']").count() == 50
    editor.locator("select").select_option("49")
    assert page.evaluate("() => document.activeElement.dataset.key") == "49-both"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("() => document.activeElement.dataset.key") == "48-stop"

    # Tokens: real widths, no character that reorders a line, nothing cut in the middle.
    editor.locator("select").select_option("0")
    assert editor.locator("[data-token='2992']").inner_text() == "<U+202E>612.3"
    for token in (2990, 2992, 2993):
        assert editor.locator(f"[data-token='{token}']").evaluate("node => node.scrollWidth <= node.clientWidth + 1")
    page.screenshot(path=ARTIFACTS / "scale_editor.png")

    # Jupyter's shortcuts do not reach the notebook from any part of a view.
    before = cells(page)
    patches = find(page, ".scale-patches")
    plan = find(page, ".workbench-plan")
    focusable = [
        strip,
        editor.locator("[data-key='0-both']"),
        editor.locator("select"),
        editor.locator("button").first,
        large.locator(".wb-above"),
        large.locator("select"),
        large.locator("input"),
        patches.locator(".wb-above").first,
        plan.locator("input[type=checkbox]").first,
        plan.locator(".noUi-handle"),
    ]
    for node in focusable:
        node.focus()
        for key in ("d", "d", "b", "x", "Enter", "z"):
            page.keyboard.press(key)
    page.wait_for_timeout(300)
    assert cells(page) == before
    page.keyboard.press("Escape")

    # Fifty images: pages of a dozen, in a view that fits the screen.
    patches.scroll_into_view_if_needed()
    assert patches.bounding_box()["height"] < 900
    assert patches.locator(".wb-item").count() == 12
    patches.locator("button", has_text="Later images").click()
    patches.locator("text=13 to 24 of 50").wait_for(timeout=10 * SECOND)
    page.screenshot(path=ARTIFACTS / "scale_patches.png")
    find(page, "text=4,000 rows in 63 lines")

    for selector in VIEWS:
        find(page, selector)
        assert serious(page, selector) == []
    go_dark(page)
    page.wait_for_timeout(1500)
    for selector in VIEWS:
        find(page, selector)
        assert serious(page, selector) == []
    page.screenshot(path=ARTIFACTS / "scale_dark.png")
    assert_no_errors(page)


def test_python_the_mouse_and_an_ended_kernel(page, lab):
    open_and_run(page, lab, NOTEBOOK)
    wait_idle(page)
    editor = find(page, ".scale-editor")
    first = editor.locator("[data-key='0-both']")

    # Python sets ranges while the mouse holds one: the view follows when it is released.
    box = first.bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 12)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 12, steps=4)
    page.wait_for_function(
        "() => document.querySelector('.seen').textContent.includes('[100, 149]')", timeout=20 * SECOND
    )
    held = int(first.get_attribute("aria-valuenow"))
    assert held != 100
    page.mouse.up()
    page.wait_for_function(
        "() => document.querySelector(\".scale-editor [data-key='0-both']\").getAttribute('aria-valuenow') === '100'",
        timeout=10 * SECOND,
    )

    # A range without an end does not freeze the tab.
    page.locator("button", has_text="endless range").click()
    page.wait_for_function(
        "() => document.querySelector('.seen').textContent.includes('1000000000000')", timeout=20 * SECOND
    )
    editor.locator("text=leaves the prompt").first.wait_for(timeout=20 * SECOND)

    # Another prompt: undo does not bring back the ranges of this one.
    page.locator("button", has_text="other prompt").click()
    page.wait_for_function(
        "() => document.querySelector('.seen').textContent.includes('[20, 29]')", timeout=20 * SECOND
    )
    assert editor.locator("button", has_text="Undo").is_disabled()
    editor.locator("[data-key='0-both']").press("ArrowRight")
    page.wait_for_function(
        "() => document.querySelector('.seen').textContent.includes('[21, 30]')", timeout=20 * SECOND
    )

    # Without a kernel the view says so, and ranges stay where they are.
    assert_no_errors(page)
    end_kernels(lab)
    editor.locator("text=No kernel is connected").wait_for(timeout=60 * SECOND)
    handle = editor.locator("[data-key='0-both']")
    handle.press("ArrowRight")
    assert handle.get_attribute("aria-valuenow") == "21"
    assert editor.locator("button", has_text="Add range").is_disabled()
    page.screenshot(path=ARTIFACTS / "scale_no_kernel.png")
