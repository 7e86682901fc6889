"""What stress tests share: their part of the time, threads side by side, a signal storm, an extension that marks."""

import importlib.util
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl

from ..side_by_side import side_by_side

HERE = Path(__file__).parent

SETUP = """
from setuptools import Extension, setup
import dirtylog
setup(name="stores", ext_modules=[Extension("stores", ["stores.c"], include_dirs=[dirtylog.get_include()])])
"""


class Ledger:
    """What is known of some pages in one round: each was marked once, so each must be in one harvest."""

    def __init__(self, npages):
        self.npages = npages
        self.seen = dl.DirtyPages._empty(npages)
        self.lock = threading.Lock()

    def enter(self, harvested):
        with self.lock:
            twice = self.seen & harvested
            assert not twice, f"{twice.count} marks came in two harvests, the first of page {next(iter(twice))}"
            self.seen |= harvested

    def close(self):
        """Return how many marks were accounted for: all there were."""
        lost = dl.DirtyPages._all(self.npages, exact=True) - self.seen
        assert not lost, f"{lost.count} of {self.npages} marks are lost, the first of page {next(iter(lost))}"
        assert self.seen.count == self.npages
        return self.seen.count


@contextmanager
def signal_storm():
    """Interrupt this process a thousand times a second, system calls too; the list it gives counts how often."""
    caught = [0]

    def handler(number, frame):
        caught[0] += 1

    before = signal.signal(signal.SIGALRM, handler)
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        yield caught
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Stress:
    """The time this test has, and the place where it says what it counted."""

    ledger = Ledger
    side_by_side = staticmethod(side_by_side)
    signal_storm = staticmethod(signal_storm)
    here = HERE

    def __init__(self, request, seconds):
        self.request = request
        self.seconds = seconds
        self.counts = {}

    def rounds(self):
        """Count rounds until this test's time is over."""
        end = time.monotonic() + self.seconds
        number = 0
        while number == 0 or time.monotonic() < end:
            number += 1
            yield number

    def count(self, what, number):
        self.counts[what] = self.counts.get(what, 0) + int(number)


@pytest.fixture
def stress(request):
    """The time and the ledger of one stress test; what it counted is printed at the end of the run."""
    config = request.config
    sharing = sum(1 for item in request.session.items if "stress" in item.fixturenames)
    tool = Stress(request, config.getoption("--stress-seconds") / sharing)
    yield tool
    config.stash[config.stress_key].append((request.node.name, tool.counts))


@pytest.fixture(scope="session")
def stores(c_compiler, tmp_path_factory):
    """The extension of ``stores.c``, built as another package's would be: it stores and marks through the C API."""
    directory = tmp_path_factory.mktemp("stores")
    shutil.copy(HERE / "stores.c", directory)
    (directory / "setup.py").write_text(SETUP)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=directory,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(dl.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    path = directory / f"stores{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("stores", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Replica:
    """A second copy of values, kept right by harvests alone."""

    def __init__(self, values):
        self.values = values
        self.copy = values.copy()

    def take(self, harvested):
        pages = harvested.indices()
        self.copy[pages] = self.values[pages]
        return len(pages)

    def check(self):
        stale = np.flatnonzero(self.copy != self.values)
        assert not stale.size, f"{stale.size} pages were stored to and not reported since, the first {stale[0]}"


@pytest.fixture
def replica():
    """A copy of values, kept right by harvests alone: a mark that is lost leaves it wrong."""
    return Replica
