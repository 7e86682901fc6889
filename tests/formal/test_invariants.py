"""The page of invariants defines every rule that the project cites, and names only what exists."""

import re
from pathlib import Path

import pytest

from formal.catalog import CHECKS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explanation" / "invariants.md"
CITED_IN = ("dirtylog", "formal", "tests", "docs", "tools", "fuzz", "benchmarks", "examples")
TEXTS = {".py", ".pyi", ".pyx", ".pxd", ".c", ".h", ".pml", ".md", ".txt"}


def sections(text):
    """The rules of the page by number: (what is kept where, what breaks)."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        number = int(re.match(r"I(\d+): ", part).group(1))
        _, kept, breaks = re.split(r"^(?:Kept in|Breaks)$", part, flags=re.MULTILINE)
        found[number] = kept, breaks
    return found


RULES = sections(PAGE.read_text())


def entries(text):
    """The lines of a list as (what stands before the names, the names)."""
    for line in re.findall(r"^: (.*)$", text, re.MULTILINE):
        if line.startswith("`"):
            path, *names = re.findall(r"`([^`]+)`", line)
            yield path, names
        else:
            yield line.split()[0], re.findall(r"`([^`]+)`", line)


def cited(text):
    return {int(number) for number in re.findall(r"\bI([1-9]\d*)\b", text)}


def test_every_rule_that_is_cited_is_defined():
    unknown = [
        (str(path.relative_to(ROOT)), number)
        for folder in CITED_IN
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in TEXTS and "_build" not in path.parts and path.name != Path(__file__).name
        for number in sorted(cited(path.read_text()) - set(RULES))
    ]
    assert unknown == []


def test_a_rule_that_is_not_defined_is_found():
    assert cited("/* I10: see dl_mark(); I3, */ I002 UI2") == {10, 3}


def test_the_rules_are_numbered_without_a_gap():
    assert list(RULES) == list(range(1, len(RULES) + 1))


@pytest.mark.parametrize("number", RULES)
def test_where_a_rule_is_kept_is_there_and_is_cited(number):
    kept, _ = RULES[number]
    places = list(entries(kept))
    assert places
    for path, names in places:
        text = (ROOT / path).read_text()
        assert [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)] == [], path
    # A few cite it by the function that they call; most by its number.
    citing = [path for path, _ in places if number in cited((ROOT / path).read_text())]
    assert 2 * len(citing) > len(places), f"I{number} is cited by {citing} alone"


@pytest.mark.parametrize("number", RULES)
def test_what_breaks_without_a_rule_is_there(number):
    variants = {f"{check.model}/{check.variant}" for check in CHECKS if check.expect == "refuted"}
    mistakes = set(re.findall(r"^@ ([\w-]+),", (ROOT / "tools" / "mutations.txt").read_text(), re.MULTILINE))
    _, breaks = RULES[number]
    places = list(entries(breaks))
    assert any(path.startswith("tests/") for path, _ in places)
    for path, names in places:
        if path.startswith("tests/"):
            files = sorted((ROOT / path).rglob("test_*.py")) or [ROOT / path]
            known = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
        else:
            known = variants if path == "model" else mistakes
        assert [name for name in names if name not in known] == [], path
