"""The page on the formal models has a section for each model and a paragraph for each wrong variant that is checked."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refuted(monkeypatch):
    """The wrong variants of each model, in the catalogue."""
    monkeypatch.syspath_prepend(str(ROOT))
    from formal.catalog import CHECKS

    found = {check.model: set() for check in CHECKS}
    for check in CHECKS:
        if check.expect == "refuted":
            found[check.model].add(check.variant)
    return found


def told():
    """What the page tells of: model -> names with a paragraph of their own."""
    page = (ROOT / "docs" / "explanation" / "formal.md").read_text()
    models = page.partition("\n## The models\n")[2].partition("\n## ")[0]
    parts = re.split(r"^### `(\w+)`.*$", models, flags=re.MULTILINE)
    return {
        model: re.findall(r"^`([\w-]+)`\n: \S", text, re.MULTILINE)
        for model, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_every_model_has_a_section_and_every_wrong_variant_one_paragraph(refuted):
    page = told()
    assert {model: sorted(names) for model, names in page.items()} == {
        model: sorted(names) for model, names in refuted.items()
    }
