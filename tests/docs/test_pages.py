"""Every example of the documentation runs, page by page, and every program in examples/."""

import doctest
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import dirtylog as dl

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts and "```pycon" in page.read_text()
)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL


def missing(text):
    """What a page or program says it needs, in a comment `needs: module`, and this checkout does not have."""
    return [module for module in re.findall(r"needs: ([\w.]+)", text) if find_spec(module) is None]


def examples_of(page):
    """The pycon blocks of a page as one session, each line where it stands in the file."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = line.startswith("```pycon")
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_the_examples_of_a_page_give_what_the_page_says(page, tmp_path, monkeypatch):
    if absent := missing(page.read_text()):
        pytest.skip(f"the page is about {', '.join(absent)}, which this checkout does not have")
    session = examples_of(page)
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(session, {}, page.name, str(page), 0)
    said = []
    outcome = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert outcome.failed == 0, "".join(said)
    assert outcome.attempted


@pytest.mark.parametrize("program", EXAMPLES, ids=lambda program: program.name)
def test_a_program_in_examples_runs_and_checks_itself(program, tmp_path):
    if absent := missing(program.read_text()):
        pytest.skip(f"the program needs {', '.join(absent)}, which this checkout does not have")
    done = run_program(program, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def run_program(program, directory):
    """Run a program elsewhere, with the dirtylog that is tested here, which need not be installed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(dl.__file__).parents[1]), "PYTHONWARNINGS": "error"}
    command = [sys.executable, program]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_an_example_that_says_something_wrong_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```pycon\n>>> 1 + 1\n3\n\n```\n")
    with pytest.raises(AssertionError, match="Expected"):
        test_the_examples_of_a_page_give_what_the_page_says(page, tmp_path, monkeypatch)


def test_the_broken_order_shows_its_bug_in_every_run(tmp_path):
    for _ in range(3):
        done = run_program(ROOT / "examples" / "broken_order.py", tmp_path)
        assert [line.split(":")[1].split(" pages")[0].strip() for line in done.stdout.splitlines()] == [
            "0 of 256",
            "256 of 256",
        ]
