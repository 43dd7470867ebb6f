"""A real JupyterLab on localhost and a real Chromium in front of it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARTIFACTS = ROOT / "test-artifacts"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
REQUIRED = os.environ.get("WORKBENCH_REQUIRE_BROWSER") == "1"


def pytest_report_header(config):
    if CHROMIUM is None and not REQUIRED:
        return "no Chromium found: the browser tests are LEFT OUT (Debian and Ubuntu: apt-get install chromium)"
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
def lab(tmp_path_factory):
    """The address of a JupyterLab that serves a copy of the notebooks beside the data, started as `make lab` starts it."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", home / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for notebook in Path(__file__).parent.glob("*.ipynb"):
        shutil.copy(notebook, home / "notebooks" / notebook.name)
    (home / "data").symlink_to(ROOT / "data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("LAB_QUIET"))
    command = [
        sys.executable, "-m", "jupyter", "lab", *options.split(":=")[1].split(), f"--port={port}", "--ip=127.0.0.1",
        "--no-browser", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--allow-root",
        f"--ServerApp.root_dir={home}",
    ]  # fmt: skip
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
                   "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}  # fmt: skip
    ARTIFACTS.mkdir(exist_ok=True)
    with (ARTIFACTS / "jupyterlab.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=home)
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (ARTIFACTS / "jupyterlab.log").read_text()
                time.sleep(0.25)
        yield address
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture
def page(chromium, lab):
    """A page that notes every console error and every request that leaves this machine."""
    context = chromium.new_context(viewport={"width": 1440, "height": 1000}, reduced_motion="reduce")
    page = context.new_page()
    page.console_errors, page.outside = [], []
    page.on("console", lambda message: page.console_errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.console_errors.append(str(error)))
    local = ("http://127.0.0.1", "ws://127.0.0.1", "http://localhost", "ws://localhost", "data:", "blob:", "about:")
    page.on("request", lambda request: None if request.url.startswith(local) else page.outside.append(request.url))
    yield page
    context.close()
