"""The range editor in a browser: mouse, keyboard, touch, undo, updates from Python, a long prompt, both themes."""

from __future__ import annotations

import re
import time

import pytest
from playwright.sync_api import Error as PlaywrightError

from tests.browser.conftest import ARTIFACTS
from tests.browser.test_notebooks import SECOND, assert_no_errors, find, go_dark, open_and_run, wait_idle

pytestmark = pytest.mark.browser
NOTEBOOK = "range_editor.ipynb"


def ranges(page):
    text = page.locator(".seen").first.inner_text()
    return [[int(number) for number in pair] for pair in re.findall(r"\[(\d+), (\d+)\]", text)]


def wait_ranges(page, wanted):
    page.wait_for_function(
        "wanted => document.querySelector('.seen').textContent.includes(wanted)",
        arg=f"python has {wanted}",
        timeout=20 * SECOND,
    )


def scroll_to(page, node):
    for _ in range(20):  # lint's result for the previous move may be redrawing the strip
        try:
            node.scroll_into_view_if_needed(timeout=SECOND)
            return
        except PlaywrightError:
            page.wait_for_timeout(100)
    raise AssertionError("the handle is redrawn all the time")


def drag(page, node, dx, dy=0, steps=8):
    scroll_to(page, node)
    box = node.bounding_box()
    x, y = box["x"] + min(box["width"] / 2, 30), box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx, y + dy, steps=steps)
    page.mouse.up()


def swipe(page, node, dx, dy, steps=8):
    """Drag the node with a finger: the events that a touch screen sends."""
    scroll_to(page, node)
    box = node.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    screen = page.context.new_cdp_session(page)
    screen.send("Emulation.setTouchEmulationEnabled", {"enabled": True})
    screen.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
    for step in range(1, steps + 1):
        at = {"x": x + dx * step / steps, "y": y + dy * step / steps}
        screen.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [at]})
        page.wait_for_timeout(20)
    screen.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    screen.send("Emulation.setTouchEmulationEnabled", {"enabled": False})
    screen.detach()


SCROLLED = """node => {
    const all = [];
    for (let at = node; at; at = at.parentElement) all.push(at.scrollTop);
    return all.reduce((a, b) => a + b);
}"""


def test_moving_ranges_by_key_mouse_and_touch_updates_python(page, lab, capsys):
    open_and_run(page, lab, NOTEBOOK)
    wait_idle(page)
    editor = find(page, ".short-editor")
    wait_ranges(page, [[3, 52], [52, 101]])
    assert editor.locator(".wb-finding.wb-error").count() == 0
    page.screenshot(path=ARTIFACTS / "editor_light.png")

    # By keyboard: moved one token to the right, the first range overlaps the second.
    first = editor.locator("[data-key='0-both']")
    first.focus()
    start = time.perf_counter()
    first.press("ArrowRight")
    editor.locator("text=overlaps embedding_ranges[0]").wait_for(timeout=20 * SECOND)
    feedback = time.perf_counter() - start
    within = editor.locator(".wb-editor").evaluate("editor => Number(editor.dataset.feedbackMilliseconds)")
    wait_ranges(page, [[4, 53], [52, 101]])
    editor.locator("text=are outside every range").wait_for(timeout=20 * SECOND)
    page.screenshot(path=ARTIFACTS / "editor_overlap.png")
    editor.locator("[data-key='0-both']").press("Control+z")
    wait_ranges(page, [[3, 52], [52, 101]])
    editor.locator("[data-key='0-both']").press("Control+y")
    wait_ranges(page, [[4, 53], [52, 101]])
    editor.locator("button", has_text="Undo").click()
    wait_ranges(page, [[3, 52], [52, 101]])

    # By mouse: drag the ends; no range leaves the prompt or becomes empty.
    drag(page, editor.locator("[data-key='1-stop']"), -150)
    page.wait_for_function(
        "() => !document.querySelector('.seen').textContent.includes('52, 101')", timeout=20 * SECOND
    )
    (_, (a, b)) = ranges(page)
    assert a == 52
    assert 52 < b < 101
    editor.locator("text=contains").first.wait_for(timeout=20 * SECOND)
    page.locator("button", has_text="back from python").click()
    wait_ranges(page, [[3, 52], [52, 101]])
    drag(page, editor.locator("[data-key='0-start']"), 300, 200)
    wait_ranges(page, [[51, 52], [52, 101]])

    # By touch, which must not scroll the page instead.
    page.locator("button", has_text="back from python").click()
    wait_ranges(page, [[3, 52], [52, 101]])
    stop = editor.locator("[data-key='1-stop']")
    scroll_to(page, stop)
    scrolled = stop.evaluate(SCROLLED)
    swipe(page, stop, -20, -45)
    assert editor.locator("[data-key='1-stop']").evaluate(SCROLLED) == scrolled
    page.wait_for_function(
        "() => !document.querySelector('.seen').textContent.includes('52, 101')", timeout=20 * SECOND
    )
    ((c, d), (a, b)) = ranges(page)
    assert (a, c, d) == (52, 3, 52)
    assert 52 < b < 101
    page.locator("button", has_text="back from python").click()
    wait_ranges(page, [[3, 52], [52, 101]])

    # Add and remove a range, then restore both from Python.
    editor.locator("button", has_text="Add range").click()
    page.wait_for_function(
        "() => (document.querySelector('.seen').textContent.match(/\\[\\d/g) || []).length === 3", timeout=20 * SECOND
    )
    editor.locator("text=2 input_embeddings but 3 embedding_ranges").wait_for(timeout=20 * SECOND)
    editor.locator("[data-key='2-both']").press("Delete")
    page.locator("button", has_text="back from python").click()
    wait_ranges(page, [[3, 52], [52, 101]])
    editor.locator("button", has_text="Copy for LMDeploy").click()
    editor.locator("text=input_embedding_ranges=[[3, 52], [52, 101]]").wait_for(timeout=20 * SECOND)
    with capsys.disabled():
        print(
            f"\nkey to lint feedback: {within:.0f} ms in the page, {feedback * 1000:.0f} ms with the test's round trip"
        )
    assert_no_errors(page)


def test_long_prompt_renders_few_nodes_and_scrolls(page, lab, capsys):
    open_and_run(page, lab, NOTEBOOK)
    wait_idle(page)
    editor = find(page, ".long-editor")
    strip = editor.locator(".wb-strip")
    assert editor.locator(".wb-token").count() < 1500
    frames = strip.evaluate(
        """async strip => {
            const times = [];
            let last = performance.now();
            for (let step = 0; step < 120; step++) {
                strip.scrollTop += 60;
                await new Promise(requestAnimationFrame);
                const now = performance.now();
                times.push(now - last);
                last = now;
            }
            return times.sort((a, b) => a - b);
        }"""
    )
    strip.evaluate("strip => { strip.scrollTop = strip.scrollHeight; }")
    handle = editor.locator("[data-key='1-stop']")
    handle.wait_for(timeout=20 * SECOND)
    handle.press("PageUp")
    editor.locator("text=contains 110 tokens").first.wait_for(timeout=20 * SECOND)
    page.screenshot(path=ARTIFACTS / "editor_long.png")
    with capsys.disabled():
        print(f"\nscrolling 8,192 tokens: median frame {frames[60]:.1f} ms, 95 % within {frames[114]:.1f} ms")
    assert_no_errors(page)


def test_text_contrast_in_dark_theme_meets_wcag(page, lab):
    open_and_run(page, lab, NOTEBOOK)
    wait_idle(page)
    go_dark(page)
    editor = find(page, ".short-editor")
    # The contrast of text and background meets the WCAG minimum (4.5).
    contrast = (
        editor.locator(".wb-token")
        .nth(1)
        .evaluate(
            """node => {
            const parse = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
            const light = rgb => {
                const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const ink = light(parse(getComputedStyle(node).color));
            const paper = light(parse(getComputedStyle(node.closest('.wb-strip')).backgroundColor));
            return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
        }"""
        )
    )
    assert contrast > 4.5
    page.screenshot(path=ARTIFACTS / "editor_dark.png")
    assert_no_errors(page)
