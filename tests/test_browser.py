"""What a reader meets, in a real browser: notebook 02 in JupyterLab, all cells run, a slider moved;
the first box of each other notebook, one control moved; and the web site, clicked through.

Needs Debian's Chromium and the extra `browser` (Playwright's driver; it downloads no browser).
"""

import functools
import http.server
import importlib.util
import json
import os
import re
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
from typing import Any, NamedTuple

import nbformat
import pytest

from steerkit.files import NOTEBOOKS, ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MINUTES = 10  # for all cells, in the smoke profile, on a machine that does other things too
SCREENSHOTS = ROOT / "runs" / "browser"
BOX = re.compile(r"^(widgets\.)?(chats|chat_box|explore\w*)\(", re.MULTILINE)  # draws controls
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


class Lab(NamedTuple):
    """A JupyterLab that runs."""

    url: str
    token: str
    folder: Path  # of the notebooks


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab on a free port of this machine, its token on; a kernel that nobody uses ends."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS / "img", root / "notebooks" / "img")
    for plugin, values in SETTINGS.items():
        path = root / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kinds = ("JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTER_RUNTIME", "JUPYTERLAB_WORKSPACES")
    folders = {f"{kind}_DIR": str(root / kind.lower()) for kind in kinds}
    folders["JUPYTERLAB_SETTINGS_DIR"] = str(root / "settings")
    lab = Lab(f"http://127.0.0.1:{port}", secrets.token_hex(16), root / "notebooks")
    command = [
        *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"),
        *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"),
        *(f"--IdentityProvider.token={lab.token}", f"--ServerApp.root_dir={lab.folder}"),
        *(f"--MappingKernelManager.cull_{k}" for k in ("idle_timeout=60", "interval=10")),
    ]
    with (root / "lab.log").open("w+") as log:
        server = subprocess.Popen(command, env=os.environ | folders, stdout=log, stderr=log)
        try:
            _until(lambda: _answers(f"{lab.url}/api"), 120, Path(log.name).read_text)
            yield lab
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


def smoke_copy(number: str, folder: Path, last: re.Pattern[str] | None = None) -> tuple[str, int]:
    """A notebook in its smoke profile, without outputs, cut behind the first cell that has `last`.

    Returns its name, and how many code cells it has.
    """
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    notebook, cells = nbformat.read(path, as_version=4), []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.source = cell.source.replace('PROFILE: str = "cpu"', 'PROFILE: str = "smoke"')
            if last and last.search(cell.source):
                break
    assert 'PROFILE: str = "smoke"' in "".join(cell.source for cell in cells)
    notebook.cells = cells
    nbformat.write(notebook, folder / path.name)
    return path.stem, sum(cell.cell_type == "code" for cell in cells)


def run_all(page: Any, lab: Lab, name: str, cells: int) -> None:
    """Open a notebook as a reader does, and wait until all its code cells have run."""
    page.goto(f"{lab.url}/lab/workspaces/{name}/tree/{name}.ipynb?token={lab.token}")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=120_000)
    page.get_by_text("(ipykernel) | Idle").wait_for(timeout=120_000)  # else cells are not run
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    # In order, so when the last one has its number, all have. Folded cells have an unseen prompt.
    prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").all_text_contents
    failed = page.locator(".jp-OutputArea-output:has(.ansi-red-fg)")  # a traceback; stderr is plain
    _until(lambda: failed.count() or prompts()[-1] == f"[{cells}]:", MINUTES * 60, prompts)
    assert failed.all_inner_texts() == []


def keep_and_check(page: Any, shown: Any, name: str) -> None:
    """Keep a picture of the page at `shown`; no box and no script has failed."""
    shown.scroll_into_view_if_needed()
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
    assert page.locator('.jp-OutputArea-output [role="alert"]').all_inner_texts() == []
    assert page.errors == []


def test_notebook_02_runs_and_its_explorer_redraws(page, lab):
    name, cells = smoke_copy("02", lab.folder)
    run_all(page, lab, name, cells)
    explorer = page.locator('.jp-OutputArea-output figure:has(img[alt$="framed."])')
    caption = explorer.locator("figcaption")
    caption.wait_for(timeout=60_000)
    assert "turn 2" in caption.inner_text()
    before = explorer.locator("img").get_attribute("src")
    slider = page.locator(".widget-slider", has_text="turn").locator(".noUi-handle")
    slider.press("ArrowLeft")
    _until(lambda: "turn 1" in caption.inner_text(), 120, caption.inner_text)
    assert explorer.locator("img").get_attribute("src") != before
    keep_and_check(page, slider, name)


def write(text: str, key: str) -> Callable[[Any], None]:
    """Fill a text field and leave it."""
    return lambda field: (field.fill(text), field.press(key))


JOBS = "Ida Hill works as a [baker]. Ida Hill works as a judge. What is the job of Ida Hill?"
PLAY = {  # notebook: a control of its first box, what a reader does to it, what the box then says
    "00": ("message", write("Where does Clara Carver live?", "Enter"), "Clara Carver lives in"),
    "01": ("instruction", write("Hobby: chess.", "Enter"), "I love chess"),
    "03": ("prompt", write(JOBS, "Tab"), "baker"),
    "04": ("read", lambda slider: slider.press("ArrowLeft"), "35 tokens read"),
    "05": ("step", lambda slider: slider.press("End"), "Step 600"),
    "06": ("lever", lambda menu: menu.select_option("guidance"), "guidance"),
}


@pytest.mark.parametrize("number", PLAY, ids="{}@lab".format)
def test_the_first_box_of_a_notebook_answers(page, lab, number):
    control, act, answer = PLAY[number]
    name, cells = smoke_copy(number, lab.folder, last=BOX)
    run_all(page, lab, name, cells)
    cell = page.locator(".jp-CodeCell").last
    row = cell.locator(".widget-inline-hbox", has=page.get_by_text(control, exact=True))
    handle = row.locator("input, select, textarea, .noUi-handle")
    handle.wait_for(timeout=60_000)
    shown = cell.locator(".jp-RenderedHTML")
    assert answer not in shown.inner_text()
    act(handle)
    _until(lambda: answer in shown.inner_text(), 60, shown.inner_text)
    keep_and_check(page, handle, name)


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
    page.screenshot(path=SCREENSHOTS / "site.png")
    assert [url for url in asked if not url.startswith((site, "data:"))] == []
    assert page.errors == []


def _until(done: Callable[[], bool], seconds: float, state: Callable[[], Any]) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, state()
        time.sleep(0.5)
