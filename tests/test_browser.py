"""Notebook 02 as a reader meets it: JupyterLab in a real browser, all cells run, a slider moved.

Needs Debian's Chromium and the extra `browser` (Playwright's driver; it downloads no browser).
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from steerkit.files import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NAME = "02_attention_heatmaps"
MINUTES = 10  # for all cells, in the smoke profile, on a machine that does other things too
SCREENSHOT = ROOT / "runs" / "browser" / f"{NAME}.png"
QUIET = (  # in a closed network each of these would fail, loudly
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
SETTINGS = {  # no questions to the network, and cells beyond the screen are on the page too
    "apputils-extension/notification": {"checkForUpdates": False, "fetchNews": "false"},
    "notebook-extension/tracker": {"windowingMode": "none"},
}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.first(60),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt install chromium"),
]


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    """A folder with the notebook in its smoke profile and without outputs."""
    source = nbformat.read(ROOT / "notebooks" / f"{NAME}.ipynb", as_version=4)
    for cell in source.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.source = cell.source.replace('PROFILE: str = "cpu"', 'PROFILE: str = "smoke"')
    assert any('PROFILE: str = "smoke"' in cell.source for cell in source.cells)
    path = tmp_path / "notebooks" / f"{NAME}.ipynb"
    path.parent.mkdir()
    nbformat.write(source, path)
    return path


@pytest.fixture
def lab(notebook: Path, tmp_path: Path) -> Iterator[str]:
    """JupyterLab on a free port of this machine, its token on -> the notebook's address."""
    for plugin, values in SETTINGS.items():
        path = tmp_path / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    places = {
        f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower())
        for kind in ("CONFIG", "DATA", "RUNTIME")
    }
    places |= {
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
        "STEERKIT_RUNS": str(tmp_path / "runs"),
    }
    command = [
        *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"),
        *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"),
        *(f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebook.parent}"),
    ]
    log = (tmp_path / "lab.log").open("w")
    server = subprocess.Popen(command, env=os.environ | places, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api", server, tmp_path / "lab.log")
        yield f"http://127.0.0.1:{port}/lab/tree/{notebook.name}?token={token}"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Any]:
    """A page of headless Chromium; `page.said` collects console errors and exceptions."""
    driver = pytest.importorskip("playwright.sync_api", reason="pip install -e .[browser]")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*QUIET, "--no-sandbox"], chromium_sandbox=False
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.said = []
        page.on("console", lambda m: page.said.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.said.append(str(error)))
        try:
            yield page
        finally:
            browser.close()


def test_notebook_02_runs_and_its_explorer_redraws(page: Any, lab: str) -> None:
    page.goto(lab)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=120_000)
    page.get_by_text("(ipykernel) | Idle").wait_for(timeout=120_000)  # else cells are not run
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt")
    _until(lambda: _all_run(prompts.all_inner_texts()), MINUTES * 60, prompts.all_inner_texts)

    explorer = page.locator('.jp-OutputArea-output figure:has(img[alt$="framed."])')
    caption = explorer.locator("figcaption")
    caption.wait_for(timeout=60_000)
    assert "turn 8" in caption.inner_text()
    before = explorer.locator("img").get_attribute("src")
    slider = page.locator(".widget-slider", has_text="turn").locator(".noUi-handle")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    _until(lambda: "turn 5" in caption.inner_text(), 120, caption.inner_text)
    assert explorer.locator("img").get_attribute("src") != before
    slider.scroll_into_view_if_needed()
    SCREENSHOT.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOT)

    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    assert page.locator('.jp-OutputArea-output [role="alert"]').count() == 0
    assert page.said == []


def _all_run(prompts: list[str]) -> bool:
    return len(prompts) > 10 and all(p.strip("[]: ").isdigit() for p in prompts)


def _until(done: Any, seconds: float, state: Any) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, state()
        time.sleep(1)
