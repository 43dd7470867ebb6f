"""A real JupyterLab on localhost and a real Chromium that opens it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from workbench.cli.lab import OFFLINE

ROOT = Path(__file__).parents[2]
ARTIFACTS = ROOT / "test-artifacts"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
REQUIRED = os.environ.get("WORKBENCH_REQUIRE_BROWSER") == "1"


def pytest_report_header(config):
    if CHROMIUM is None and not REQUIRED:
        return "no Chromium found: the browser tests are SKIPPED (Debian and Ubuntu: apt-get install chromium)"
    return f"browser: {CHROMIUM}"


@pytest.fixture(scope="session")
def chromium():
    if CHROMIUM is None:
        message = "no Chromium found: install it (Debian and Ubuntu: apt-get install chromium)"
        pytest.fail(message) if REQUIRED else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab_server(tmp_path_factory):
    home = tmp_path_factory.mktemp("lab")
    for address in serve("lab", home):
        yield address, home


@pytest.fixture
def lab(lab_server):
    """The address of a JupyterLab with a fresh copy of the notebooks and the data, started like `make lab`."""
    address, home = lab_server
    copy_notebooks(home)  # JupyterLab saves open notebooks, with widget views whose kernels have ended
    shutil.rmtree(home / "settings", ignore_errors=True)  # and the theme that the last test chose
    yield address
    end_kernels(address)


@pytest.fixture
def notebook7(tmp_path_factory):
    """The address of a Jupyter Notebook 7 with the same files."""
    yield from serve("notebook", tmp_path_factory.mktemp("notebook"))


def copy_notebooks(home):
    shutil.copytree(
        ROOT / "notebooks", home / "notebooks", dirs_exist_ok=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints")
    )
    for notebook in Path(__file__).parent.glob("*.ipynb"):
        shutil.copy(notebook, home / "notebooks" / notebook.name)


def kernels_of(address, seconds=30):
    """The server's kernels. Retries on status 500, which it returns while a kernel is starting."""
    until = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"{address}/api/kernels", timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 500 or time.monotonic() > until:
                raise
        time.sleep(0.1)


def end_kernels(address):
    """End all kernels: a closed page leaves its kernel running, with models and threads."""
    for kernel in kernels_of(address):
        request = urllib.request.Request(f"{address}/api/kernels/{kernel['id']}", method="DELETE")
        try:
            urllib.request.urlopen(request, timeout=60).close()
        except urllib.error.HTTPError as error:
            if error.code != 404:  # it has ended meanwhile
                raise


def serve(application, home):
    """Run a Jupyter application until the generator is closed."""
    copy_notebooks(home)
    (home / "data").symlink_to(ROOT / "data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "jupyter", application, *OFFLINE, f"--port={port}", "--ip=127.0.0.1",
        "--no-browser", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--allow-root",
        "--expose-app-in-browser", f"--ServerApp.root_dir={home}", "--ServerApp.disable_check_xsrf=True",  # end_kernels sends no XSRF token
    ]  # fmt: skip
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
                   "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}  # fmt: skip
    ARTIFACTS.mkdir(exist_ok=True)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    log_file = ARTIFACTS / f"jupyter_{application}{worker}.log"
    with log_file.open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=home)
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=2)
                break
            except OSError:
                assert server.poll() is None, log_file.read_text()
                time.sleep(0.25)
        yield address
        server.terminate()
        server.wait(timeout=30)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Save a screenshot of the page if a test fails, before its kernel is ended."""
    report = yield
    if report.failed and report.when == "call" and "page" in item.funcargs:
        item.funcargs["page"].screenshot(path=ARTIFACTS / f"failed_{item.name}.png")
    return report


@pytest.fixture
def page(chromium):
    """A page that records every console error and every request to another machine."""
    context = chromium.new_context(viewport={"width": 1440, "height": 1000}, reduced_motion="reduce")
    page = context.new_page()
    page.console_errors, page.outside = [], []
    page.on("console", lambda message: page.console_errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.console_errors.append(str(error)))
    local = ("http://127.0.0.1", "ws://127.0.0.1", "http://localhost", "ws://localhost", "data:", "blob:", "about:")
    page.on("request", lambda request: None if request.url.startswith(local) else page.outside.append(request.url))
    yield page
    context.close()


def serious(page, selector):
    """The serious and critical violations of accessibility that axe finds inside a view."""
    from axe_playwright_python.sync_playwright import Axe

    return [
        f"{selector}: {each['id']}: {each['help']} ({node['html'][:160]})"
        for each in Axe().run(page, context=selector).response["violations"]
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
