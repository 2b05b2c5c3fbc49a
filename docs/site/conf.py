"""Sphinx's settings for the web site that build.py makes: nothing on a page comes from outside."""

import re
from importlib.metadata import version as version_of
from typing import Any

project = "steerkit"
author = copyright = "The steerkit authors"
version = release = version_of("steerkit")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx-mathjax-offline"]
suppress_warnings = ["myst.xref_missing", "mystnb.unknown_mime_type"]

nb_execution_mode = "off"  # pages show the stored outputs
nb_ipywidgets_js: dict = {}  # would be loaded from a server; stored notebooks hold no widgets
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
default_role = "code"  # docstrings write `name` as the notebooks do
python_maximum_signature_line_length = 80

html_theme = "sphinx_book_theme"
html_title = "steerkit"
html_show_sourcelink = False
html_context = {"default_mode": "auto"}  # light or dark
html_copy_source = False
html_css_files = ["site.css"]
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A docstring's indented blocks shown as they stand; its stars and bars are no markup."""
    block, new = "", []
    for before, line in zip(["", *lines], lines, strict=False):
        if not line.strip():
            new.append(line)
            continue
        indented, example = line.startswith("    "), line.lstrip().startswith(">>>")
        if not before.strip() and not block and indented and not example:
            new += ["::", ""]
        if not before.strip() or block != "literal":
            block = "literal" if indented or example else ""
        new.append(line if block else re.sub(r"[*|](?=(?:[^`]*`[^`]*`)*[^`]*$)", r"\\\g<0>", line))
    lines[:] = new


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", as_rst)
