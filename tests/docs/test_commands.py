"""Every command has its page, with the help of each of its parts, and each line that a page types is understood."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from dirtylog import cli

PAGES = Path(__file__).parents[2] / "docs" / "reference" / "commands"


def parts(parser, name):
    """The command and all its sub-commands, as one types them."""
    found = [name]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                found += parts(below, f"{name} {word}")
    return found


def commands():
    (action,) = [action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return action.choices


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_has_a_page_with_the_help_of_all_its_parts(name):
    page = (PAGES / f"{name}.md").read_text()
    assert re.findall(r"^```{command-help} (.*)$", page, re.MULTILINE) == parts(commands()[name], name)
    assert "## Exit codes" in page
    assert f"{{doc}}`dirtylog {name} <{name}>`" in (PAGES / "index.md").read_text()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_what_a_page_types_is_understood(name):
    page = (PAGES / f"{name}.md").read_text()
    typed = re.findall(r"^\$ dirtylog (.*)$", page, re.MULTILINE)
    assert typed
    for line in typed:
        cli.parser().parse_args(shlex.split(line))


def test_the_index_has_the_exit_codes_that_the_help_has():
    index = (PAGES / "index.md").read_text()
    for code, meaning in re.findall(r"^  (\d+) +(.*)$", cli.EXIT_CODES, re.MULTILINE):
        assert f"| {code} | {meaning} |" in index
