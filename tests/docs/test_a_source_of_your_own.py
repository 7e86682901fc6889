"""A source that is not of this package passes the same suite, and one that loses a write does not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOSES = '''
"""A source that forgets its last page."""
from contextlib import contextmanager
from types import SimpleNamespace
import dirtylog as dl

class Forgetful:
    page_size = 4096
    def __init__(self, npages):
        self.npages, self.marks = npages, dl.DirtyBitmap(npages)
    def peek(self):
        return self.marks.peek() - dl.DirtyPages.from_indices([self.npages - 1], self.npages)
    def harvest(self):
        return self.marks.harvest() - dl.DirtyPages.from_indices([self.npages - 1], self.npages)

@contextmanager
def opened(npages):
    source = Forgetful(npages)
    yield SimpleNamespace(source=source, write=source.marks.mark_pages, overreports=False)
'''


@pytest.mark.thread_unsafe(reason="runs the suite in a process of its own")
def test_the_example_of_a_source_passes_the_suite_and_a_source_that_loses_a_page_does_not(tmp_path, monkeypatch):
    (tmp_path / "forgetful.py").write_text(LOSES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    # Plain assertions: to rewrite them in hypothesis takes longer than the tests.
    command = [sys.executable, "-m", "pytest", "-q", "--assert=plain", "-p", "no:cacheprovider"]
    sources = ["--source", "examples.file_source:opened", "--source", "forgetful:opened"]
    done = subprocess.run(
        [*command, "tests/conformance/test_conformance.py", *sources],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    failed = re.findall(r"^FAILED \S+::(\w+)\[(\S*?)\]", done.stdout, re.MULTILINE)
    assert len(failed) > 5, done.stdout + done.stderr
    assert {name for _, name in failed if "file_source" in name} == set()
    assert "skipped" not in done.stdout
