"""Notebooks that have a view of their own, in a browser: open, run all, use the controls, see the view change."""

from __future__ import annotations

import time

import pytest
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from tests.browser.conftest import ARTIFACTS, kernels_of

pytestmark = pytest.mark.browser
SECOND = 1000


def open_and_run(page, lab, notebook):
    # A workspace of its own: `?reset` would start a kernel, shut it down and start another, losing what was sent to the first.
    page.goto(f"{lab}/lab/workspaces/{notebook[:2]}/tree/notebooks/{notebook}")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=120 * SECOND)
    # a kernel that is not there yet would swallow the command
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=120 * SECOND)
    wait_connected(page, lab)
    for attempt in range(6):
        answer_dialogs(page)
        try:  # JupyterLab may still be settling: it drops the command, or asks for a kernel over the menu
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
    """Until the server knows a kernel that the page listens to: a command that comes sooner makes JupyterLab ask for a kernel."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels_of(lab)):
            return
        page.wait_for_timeout(250)


def cells_run(page, lab, seconds=20):
    """Whether the kernel works: JupyterLab at times marks cells as running that no kernel ever got.

    A kernel that only says who it is is busy for a moment, too.
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
    """ "Select Kernel", which comes where the session was not there yet when a command came: take what is offered."""
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
    """Scroll through the notebook until something is there: JupyterLab draws only the cells in sight."""
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
    pytest.fail(f"{selector} did not come within {seconds} s; see not_found.png in test-artifacts")


def image(view):
    return view.locator("img").first.get_attribute("src")


def move(page, view, slider, key, image=0):
    """Press a key on a slider; return seconds until the image is another one."""
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


def errors_in(page):
    return page.locator(
        ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'], .jp-RenderedText[data-mime-type*='error']"
    )


def check_quiet(page):
    assert page.console_errors == []
    assert page.outside == []
    assert errors_in(page).count() == 0


def test_01_where_embeddings_land(page, lab):
    """The menu "what to inject", a question typed by hand, and a range moved with the keyboard."""
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
    check_quiet(page)


def test_02_compare_engines(page, lab):
    """A fault chosen from the menu changes the verdict, and back."""
    open_and_run(page, lab, "02_compare_engines.ipynb")
    wait_idle(page)
    view = find(page, ".workbench-verdict")
    view.locator("text=bug at tap embed, token 28").first.wait_for(timeout=60 * SECOND)
    page.screenshot(path=ARTIFACTS / "02_verdict.png")
    explorer = find(page, ".workbench-explorer")
    explorer.locator("text=bug at tap embed, token 28").first.wait_for(
        timeout=60 * SECOND
    )  # the last cell injected a fault
    explorer.locator(".widget-dropdown", has_text="Fault").locator("select").select_option("none")
    explorer.locator("text=noise: at most").first.wait_for(timeout=60 * SECOND)
    page.screenshot(path=ARTIFACTS / "02_clean.png")
    check_quiet(page)


def test_05_batches_of_ranges(page, lab):
    open_and_run(page, lab, "05_batches_of_ranges.ipynb")
    wait_idle(page)
    view = find(page, ".workbench-plan")
    view.locator("text=10 batches, 88% full").wait_for(timeout=60 * SECOND)
    view.locator("text=images attend bidirectionally").click()
    view.locator("text=9 batches, 97% full").wait_for(timeout=60 * SECOND)
    move(page, view, "Tokens per batch", "ArrowRight")
    page.screenshot(path=ARTIFACTS / "05_plan.png")
    check_quiet(page)


def test_06_inside_the_engine(page, lab):
    open_and_run(page, lab, "06_inside_the_engine.ipynb")
    wait_idle(page)
    find(page, "text=ten of ten")
    page.screenshot(path=ARTIFACTS / "06_burst.png")
    view = find(page, ".workbench-engine")
    view.locator("text=63 finished").wait_for(timeout=60 * SECOND)
    assert image(view).startswith("blob:")
    page.screenshot(path=ARTIFACTS / "06_live.png")
    check_quiet(page)
