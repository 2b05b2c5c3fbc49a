"""What a reader meets, in a real browser: notebook 02 in JupyterLab, all cells run, a slider moved;
and the web site, clicked through.

Needs Debian's Chromium and the extra `browser` (Playwright's driver; it downloads no browser).
"""

import functools
import http.server
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from steerkit.files import NOTEBOOKS, ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NAME = "02_attention_heatmaps"
MINUTES = 10  # for all cells, in the smoke profile, on a machine that does other things too
SCREENSHOT = ROOT / "runs" / "browser" / f"{NAME}.png"
# In a closed network each of these would fail, loudly.
OFF = ("gpu", "quic", "background-networking", "component-update", "sync")
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
    source = nbformat.read(NOTEBOOKS / f"{NAME}.ipynb", as_version=4)
    for cell in source.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.source = cell.source.replace('PROFILE: str = "cpu"', 'PROFILE: str = "smoke"')
    assert 'PROFILE: str = "smoke"' in "".join(cell.source for cell in source.cells)
    path = tmp_path / "notebooks" / f"{NAME}.ipynb"
    shutil.copytree(NOTEBOOKS / "img", path.parent / "img")
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
    kinds = ("JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTER_RUNTIME", "JUPYTERLAB_WORKSPACES")
    folders = {f"{kind}_DIR": str(tmp_path / kind.lower()) for kind in kinds}
    folders["JUPYTERLAB_SETTINGS_DIR"] = str(tmp_path / "settings")
    token = secrets.token_hex(16)
    command = [
        *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"),
        *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"),
        *(f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebook.parent}"),
    ]
    with (tmp_path / "lab.log").open("w+") as log:
        server = subprocess.Popen(command, env=os.environ | folders, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            _until(lambda: _answers(f"{url}/api"), 120, Path(log.name).read_text)
            yield f"{url}/lab/tree/{notebook.name}?token={token}"
        finally:
            server.terminate()
            server.wait(30)


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of headless Chromium; `page.errors` collects console errors and exceptions."""
    driver = pytest.importorskip("playwright.sync_api", reason="pip install -e .[browser]")
    switches = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in OFF)]
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=switches)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.errors = []
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        yield page
        browser.close()


def test_notebook_02_runs_and_its_explorer_redraws(page, lab):
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
    assert "turn 2" in caption.inner_text()
    before = explorer.locator("img").get_attribute("src")
    slider = page.locator(".widget-slider", has_text="turn").locator(".noUi-handle")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    _until(lambda: "turn 1" in caption.inner_text(), 120, caption.inner_text)
    assert explorer.locator("img").get_attribute("src") != before
    slider.scroll_into_view_if_needed()
    SCREENSHOT.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOT)

    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    assert page.locator('.jp-OutputArea-output [role="alert"]').count() == 0
    assert page.errors == []


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The web site, built and served on a free port of this machine -> its address."""
    for package in ("myst_nb", "sphinx_book_theme", "sphinx-mathjax-offline"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("the site is not built: pip install -c constraints.txt -e .[site]")
    command = [sys.executable, ROOT / "docs" / "site" / "build.py", tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=tmp_path / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_site_is_read_and_searched_without_a_network(page, site):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{site}/index.html")
    titles = [
        nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].removeprefix("# ")
        for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    ]
    for title in titles:  # from page to page, as a reader clicks
        page.locator("nav.bd-links").get_by_role("link", name=title, exact=True).click()
        page.locator("article h1", has_text=title).wait_for()
        if page.locator("article .math").count():
            page.locator("mjx-container").first.wait_for()
        assert page.locator("mjx-merror").count() == 0
        for picture in page.locator("article img").all():
            picture.scroll_into_view_if_needed()
            assert picture.evaluate("i => i.decode().then(() => i.naturalWidth)") > 0, title
    page.locator('article a[href*="glossary.html#"]').first.click()
    page.locator("article h1", has_text="Glossary").wait_for()
    assert page.locator(":target").count() == 1
    page.locator("nav.bd-links").get_by_role("link", name="Streaming: ", exact=False).click()
    page.locator("dt.sig", has_text="SinkCache").first.wait_for()

    page.goto(f"{site}/search.html?q=perplexity")
    hits = page.locator("ul.search li a")
    hits.first.wait_for()
    assert hits.count() > 3 and page.get_by_role("link", name="Glossary").count()
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.goto(f"{site}/notebooks/{sorted(NOTEBOOKS.glob('[0-9]*.ipynb'))[0].stem}.html")
    page.locator("button.theme-switch-button").first.click()
    page.locator('button.theme-change-button[data-mode="dark"]').first.click()
    page.locator('html[data-theme="dark"]').wait_for()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.screenshot(path=SCREENSHOT.with_name("site.png"))
    assert [url for url in asked if not url.startswith((site, "data:"))] == []
    assert page.errors == []


def _all_run(prompts: list[str]) -> bool:
    """Cells run in order: the last one's number is the last. A collapsed one shows none."""
    return len(prompts) > 10 and prompts[-1].strip("[]: ").isdigit()


def _until(done: Callable[[], bool], seconds: float, state: Callable[[], Any]) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, state()
        time.sleep(0.5)
