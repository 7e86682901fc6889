"""What the documentation shows runs as it is shown: the README's example, every docstring's."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import dirtylog

README = Path(__file__).parents[2] / "README.md"
# Importing the first runs the command line; the second is Cython's own, made when the package is built.
LEFT_OUT = {"dirtylog.__main__", "dirtylog._cython"}
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(dirtylog.__path__, "dirtylog.") if module.name not in LEFT_OUT
)


def readme_example():
    (code,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    return code


def test_the_readmes_example_prints_what_it_says(capsys):
    code = readme_example()
    exec(compile(code, str(README), "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert [f"# {line}" for line in printed] == re.findall(r"^# .*$", code, re.MULTILINE)
    assert len(code.splitlines()) <= 15


def test_the_readme_has_one_command_for_the_job_and_one_for_the_tests():
    commands = re.findall(r"^python -m pip install .*$", README.read_text(), re.MULTILINE)
    assert [command.partition(" && ")[2] for command in commands] == ["dirtylog demo", "python -m pytest"]


@pytest.mark.parametrize("name", ["dirtylog", *MODULES])
def test_every_docstrings_example_runs_as_it_is_shown(name):
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        getattr(module, public)  # what is imported late has docstrings too
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_every_module_says_in_its_first_line_why_it_exists():
    for name in MODULES:
        assert (importlib.import_module(name).__doc__ or "").strip(), name
