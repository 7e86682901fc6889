"""How the documentation is built: ``python -m sphinx -W -b html docs docs/_build/html`` after an in-place build."""

import contextlib
import io
import os
import re
import sys
import unittest.mock
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import dirtylog  # noqa: E402 - found in the checkout
from dirtylog import cli  # noqa: E402

project = "dirtylog"
author = "The dirtylog developers"
project_copyright = author
version = release = dirtylog.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"dirtylog {version}"
html_static_path = ["_static"]
html_logo = html_favicon = "_static/logo.svg"
# One accent, the mark's, darker where the page is light.
html_theme_options = {
    "sidebar_hide_name": False,
    "light_css_variables": {"color-brand-primary": "#c2410c", "color-brand-content": "#c2410c"},
    "dark_css_variables": {"color-brand-primary": "#fb923c", "color-brand-content": "#fb923c"},
}
html_css_files = ["dirtylog.css"]
# The documentation is built without a network, too: intersphinx is on only where its inventories are at hand.
intersphinx_mapping: dict[str, tuple[str, str | None]] = {}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Cython writes the signature into the first line of a docstring.
autodoc_docstring_signature = True
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False


def needed(page: Path) -> list[str]:
    """Return our modules that a page says it is about, in comments ``<!-- needs: module -->``.

    Other people's packages are needed by its examples, and by nobody who reads it.
    """
    return re.findall(r"<!-- needs: (dirtylog\b[\w.]*) -->", page.read_text())


exclude_patterns = [
    "_build",
    "benchmarks-notes.md",  # included in benchmarks.md
    # A page about a module that this build does not have is left out.
    *(
        str(page.relative_to(HERE))
        for page in HERE.rglob("*.md")
        if "_build" not in page.parts and any(find_spec(module) is None for module in needed(page))
    ),
]


class CommandHelp(Directive):
    """``{command-help} snapshot save``: what that command prints with ``--help``, so that no page lags behind."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Let the parser itself print, at a fixed width."""
        printed = io.StringIO()
        with (
            contextlib.redirect_stdout(printed),
            contextlib.suppress(SystemExit),
            unittest.mock.patch.dict(os.environ, {"COLUMNS": "90"}),
        ):
            cli.main([*self.arguments[0].split(), "--help"])
        if not printed.getvalue().startswith("usage: "):
            raise self.error(f"dirtylog {self.arguments[0]} --help printed no usage")
        block = nodes.literal_block(text=printed.getvalue().partition("\nexit codes:")[0].rstrip())
        block["language"] = "text"
        return [block]


def setup(app: Sphinx) -> None:
    """Add the directive of this project."""
    app.add_directive("command-help", CommandHelp)
