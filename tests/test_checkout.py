"""What the files for people at the front door name is in the checkout: paths, links, versions, forms."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dirtylog as dl

ROOT = Path(__file__).parents[1]
DOORS = ["README.md", "CONTRIBUTING.md", "SECURITY.md"]


@pytest.mark.parametrize("page", DOORS)
def test_every_link_to_a_file_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    links += re.findall(r'(?:src|srcset|href)="([^"#]+)"', (ROOT / page).read_text())
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", DOORS)
def test_every_path_that_is_named_is_there(page):
    named = re.findall(
        r"`((?:\.ci|benchmarks|dirtylog|docs|examples|formal|fuzz|tests|tools)/[^`\s]*)`", (ROOT / page).read_text()
    )
    # NAME is what the reader is about to write.
    assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


def test_no_invented_address_is_published():
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert "urls" not in tomllib.load(file)["project"]
    for page in DOORS:
        assert "readthedocs.io" not in (ROOT / page).read_text()


def test_no_message_sends_anybody_to_a_package_that_is_not_published():
    sending = [path for path in (ROOT / "dirtylog").rglob("*.py") if "install 'dirtylog" in path.read_text()]
    assert sending == []


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {dl.__version__}\n" in citation


def test_every_form_asks_for_what_this_machine_offers():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    asking = [form.name for form in forms if "dirtylog info --json" in form.read_text()]
    assert asking == [form.name for form in forms if form.name != "config.yml"] != []


def test_the_page_of_environment_variables_has_all_of_them():
    page = (ROOT / "docs" / "reference" / "environment.md").read_text()
    used = set()
    for folder in ("dirtylog", "tests", "tools", "benchmarks", "fuzz", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".pyx", ".c"} or path.name == "run":
                used |= set(re.findall(r"(?:environ|getenv|switch)\W[^\n]{0,20}\b(DIRTYLOG_[A-Z_]+)", path.read_text()))
    used |= set(re.findall(r"\b(DIRTYLOG_[A-Z_]+)", (ROOT / "setup.py").read_text()))
    assert used >= {"DIRTYLOG_SIMD", "DIRTYLOG_SANITIZE", "DIRTYLOG_HYPOTHESIS"}
    assert sorted(name for name in used if f"`{name}`" not in page) == []


def test_every_picture_is_small_shown_somewhere_and_says_what_it_is():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "docs" / "conf.py"]
    text = "".join(page.read_text() for page in pages if "_build" not in page.parts)
    pictures = sorted((ROOT / "docs" / "_static").glob("*.svg"))
    assert pictures
    for picture in pictures:
        svg = picture.read_text()
        assert len(svg) < 64_000, picture
        assert picture.name in text, f"{picture} is shown on no page"
        assert "<title" in svg, picture
        assert not re.search(r"""(?:src|href|url)[=(]["']?https?://""", svg), f"{picture} loads something"


def test_no_page_comes_into_a_table_of_contents_by_a_pattern():
    pages = [page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts]
    assert [page.name for page in pages if ":glob:" in page.read_text()] == []


def profile(*arguments):
    command = [sys.executable, "-m", "benchmarks.profile", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_profile_names_the_function_that_a_row_spends_its_instructions_in(sanitized):
    if sanitized or not (shutil.which("valgrind") and shutil.which("gcc")):
        pytest.skip("valgrind and gcc are needed, and no sanitizer")
    done = profile("indices", "--pages", "65536", "--density", "0.1")
    assert done.returncode == 0, done.stderr
    title, _, whole, first, *_ = done.stdout.splitlines()
    assert title.startswith("indices, 65536 pages, 0.1 of them dirty, dirtylog")
    assert whole.split()[0] == "100.0%"
    assert " expand_" in first
    assert float(first.split()[0].rstrip("%")) > 50


@pytest.mark.parametrize("wrong", [["no such row"], ["indices", "--density", "2"], ["indices", "--pages", "3"]])
def test_a_row_that_there_is_not_is_refused_by_name(wrong):
    done = profile(*wrong)
    assert done.returncode == 2
    assert wrong[-1] in done.stderr
