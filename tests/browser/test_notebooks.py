"""Notebooks with interactive views, in a browser: open, run all cells, use the controls, check the view."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from tests.browser.conftest import ARTIFACTS, kernels_of, serious
from tests.test_memory import PEAK

pytestmark = pytest.mark.browser
SECOND = 1000


def open_and_run(page, lab, notebook):
    # A separate workspace: `?reset` would replace the first kernel by another and lose what was sent to the first.
    page.goto(f"{lab}/lab/workspaces/{notebook[:2]}/tree/notebooks/{notebook}")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=120 * SECOND)
    # without a running kernel the command would be lost
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=120 * SECOND)
    wait_connected(page, lab)
    for attempt in range(6):
        answer_dialogs(page)
        try:  # while it starts, JupyterLab may drop the command or open its kernel dialog
            page.get_by_role("menuitem", name="Run", exact=True).click(timeout=15 * SECOND)
            page.locator("[data-command='runmenu:run-all']").click(timeout=15 * SECOND)
            page.wait_for_function(
                "() => [...document.querySelectorAll('.jp-InputArea-prompt')].some(e => e.textContent.trim() === '[*]:')",
                timeout=15 * SECOND,
            )
            if cells_run(page, lab):
                return
            page.screenshot(path=ARTIFACTS / f"not_running_{attempt}.png")
        except PlaywrightTimeout:
            page.screenshot(path=ARTIFACTS / f"not_running_{attempt}.png")
            page.keyboard.press("Escape")  # an open menu
    pytest.fail("Run All Cells did not start; see the screenshots in test-artifacts")


def wait_connected(page, lab, seconds=30):
    """Wait until the page is connected to an idle kernel; before that a command opens the kernel dialog."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels_of(lab)):
            return
        page.wait_for_timeout(250)


def cells_run(page, lab, seconds=20):
    """Whether the kernel runs the cells: JupyterLab sometimes marks cells as running that no kernel received.

    A kernel that only answers an info request is busy for a moment, too, hence the two seconds.
    """
    busy_since, until = None, time.monotonic() + seconds
    while time.monotonic() < until:
        if page.evaluate(
            "() => [...document.querySelectorAll('.jp-InputArea-prompt')].some(e => /^\\[\\d+\\]:$/.test(e.textContent.trim()))"
        ):
            return True
        if any(kernel["execution_state"] == "busy" for kernel in kernels_of(lab)):
            busy_since = busy_since or time.monotonic()
            if time.monotonic() - busy_since > 2:
                return True
        else:
            busy_since = None
        page.wait_for_timeout(250)
    return False


def answer_dialogs(page):
    """Accept the default of "Select Kernel", which opens if a command came before the session was ready."""
    accept = page.locator(".jp-Dialog .jp-mod-accept")
    while accept.count():
        accept.first.click()
        page.wait_for_timeout(500)
        page.wait_for_selector(
            ".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=60 * SECOND, state="attached"
        )


def go_dark(page):
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.get_by_text("Theme", exact=True).first.hover()
    page.get_by_text("JupyterLab Dark", exact=True).first.click()
    page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'", timeout=20 * SECOND)


def wait_idle(page, seconds=240):
    page.wait_for_function(
        """() => {
            const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(e => e.textContent.trim());
            const idle = document.querySelector(".jp-Notebook-ExecutionIndicator")?.dataset.status === 'idle';
            return idle && prompts.length > 0 && prompts.every(p => /^\\[\\d+\\]:$/.test(p));
        }""",
        timeout=seconds * SECOND,
    )


def find(page, selector, seconds=240):
    """Scroll through the notebook until the selector is visible: JupyterLab renders only the cells in view."""
    until = time.monotonic() + seconds
    panel = page.locator(".jp-NotebookPanel:visible .jp-WindowedPanel-outer").first.bounding_box()
    page.mouse.move(panel["x"] + panel["width"] / 2, panel["y"] + panel["height"] / 2)
    down = True
    while time.monotonic() < until:
        found = page.locator(selector).first
        if found.count() and found.is_visible():
            found.scroll_into_view_if_needed()
            return found
        page.mouse.wheel(0, 500 if down else -20_000)
        page.wait_for_timeout(300)
        down = page.evaluate(
            "() => { const e = document.querySelector('.jp-WindowedPanel-outer');"
            " return e.scrollTop + e.clientHeight < e.scrollHeight - 5; }"
        )
    page.screenshot(path=ARTIFACTS / "not_found.png")
    pytest.fail(f"{selector} did not appear within {seconds} s; see not_found.png in test-artifacts")


def image(view):
    return view.locator("img").first.get_attribute("src")


def move(page, view, slider, key, image=0):
    """Press a key on a slider; return the seconds until the image changes."""
    handle = view.locator(".widget-slider", has_text=slider).locator(".noUi-handle")
    handle.focus()
    source = view.locator("img").nth(image).get_attribute("src")
    start = time.perf_counter()
    handle.press(key)
    page.wait_for_function(
        "([view, at, source]) => { const image = view.querySelectorAll('img')[at]; return image && image.src !== source && image.complete; }",
        arg=[view.element_handle(), image, source], timeout=60 * SECOND,
    )  # fmt: skip
    return time.perf_counter() - start


def peak_memory(lab):
    """Peak resident memory of the only running kernel so far, in bytes."""
    (kernel,) = kernels_of(lab)
    for process in psutil.process_iter(["cmdline"]):
        if any(kernel["id"] in part for part in process.info["cmdline"] or ()):
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            return int(status["VmHWM"].split()[0]) * 1024
    pytest.fail("no process of the kernel")


def errors_in(page):
    return page.locator(
        ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'], .jp-RenderedText[data-mime-type*='error']"
    )


def assert_no_errors(page):
    assert page.console_errors == []
    assert page.outside == []
    assert errors_in(page).count() == 0


def test_01_explorer_follows_menu_question_and_keys(page, lab):
    """The menu *Inject*, a typed question, and a range moved with the keyboard."""
    open_and_run(page, lab, "01_where_embeddings_land.ipynb")
    wait_idle(page)
    view = find(page, ".workbench-explorer")
    view.locator("text=The capital of Japan is Tokyo").first.wait_for(timeout=60 * SECOND)
    page.screenshot(path=ARTIFACTS / "01_explorer.png")

    inject = view.locator(".widget-dropdown", has_text="Inject").locator("select")
    inject.select_option("identity")
    view.locator("text=Ranges unchanged: [29, 30)").wait_for(timeout=60 * SECOND)
    view.locator("text=The capital of France is Paris").first.wait_for(timeout=60 * SECOND)
    assert not view.locator(".widget-text", has_text="Word").is_visible()
    page.screenshot(path=ARTIFACTS / "01_identity.png")
    inject.select_option("another word")
    view.locator("text=The capital of Japan is Tokyo").first.wait_for(timeout=60 * SECOND)

    question = view.locator(".widget-text", has_text="Question").locator("input")
    question.fill("Please tell me, in one short and simple sentence: what is the capital of France?")
    question.press("Enter")
    view.locator("text=Ranges unchanged: [40, 41)").wait_for(timeout=60 * SECOND)
    view.locator("[data-key='0-both']").press("ArrowLeft")
    view.locator("text=Ranges moved: [39, 40)").wait_for(timeout=60 * SECOND)
    assert_no_errors(page)


def test_02_fault_menu_changes_the_verdict(page, lab):
    """The injected fault gives the verdict *bug*; choosing *none* in the menu gives *noise*."""
    open_and_run(page, lab, "02_compare_engines.ipynb")
    wait_idle(page)
    view = find(page, ".workbench-verdict")
    view.locator("text=bug at tap embed, token 28").first.wait_for(timeout=60 * SECOND)
    page.screenshot(path=ARTIFACTS / "02_verdict.png")
    if sys.platform == "linux":
        assert peak_memory(lab) < PEAK, f"{peak_memory(lab) / (1 << 30):.2f} GiB"
    explorer = find(page, ".workbench-explorer")
    explorer.locator("text=bug at tap embed, token 28").first.wait_for(
        timeout=60 * SECOND
    )  # the last cell injected a fault
    explorer.locator(".widget-dropdown", has_text="Fault").locator("select").select_option("none")
    explorer.locator("text=noise: at most").first.wait_for(timeout=60 * SECOND)
    page.screenshot(path=ARTIFACTS / "02_clean.png")
    assert_no_errors(page)


def test_05_packing_plan_follows_its_controls(page, lab):
    open_and_run(page, lab, "05_batches_of_ranges.ipynb")
    wait_idle(page)
    view = find(page, ".workbench-plan")
    view.locator("text=10 batches, 88% full").wait_for(timeout=60 * SECOND)
    view.locator("text=images attend bidirectionally").click()
    view.locator("text=9 batches, 97% full").wait_for(timeout=60 * SECOND)
    move(page, view, "Tokens per batch", "ArrowRight")
    page.screenshot(path=ARTIFACTS / "05_plan.png")
    assert_no_errors(page)


def test_06_engine_view_shows_finished_requests(page, lab):
    open_and_run(page, lab, "06_inside_the_engine.ipynb")
    wait_idle(page)
    find(page, "text=ten of ten")
    page.screenshot(path=ARTIFACTS / "06_burst.png")
    view = find(page, ".workbench-engine")
    view.locator("text=63 finished").wait_for(timeout=60 * SECOND)
    assert image(view).startswith("data:image/png")
    page.screenshot(path=ARTIFACTS / "06_live.png")
    assert serious(page, ".workbench-engine") == []
    assert_no_errors(page)
