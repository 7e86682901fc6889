"""What the tests of fleets share: a repository, an engine of threads, and the threads that zarr keeps."""

import threading
from itertools import count

import pytest


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    """In place of the suite's: zarr keeps its threads for the next call, and Dask some until its loop ends."""
    before = set(threading.enumerate())
    yield
    left = [each for each in threading.enumerate() if each not in before and each.name.startswith("dirtylog")]
    assert not left, f"still running: {left}"


@pytest.fixture
def icechunk():
    package = pytest.importorskip("icechunk")
    package.set_logs_filter("error")
    return package


@pytest.fixture
def repos(icechunk, tmp_path):
    """Repositories in directories: what is in memory cannot travel to a worker."""
    from dirtylog.sinks.store import repository

    return (repository(tmp_path / str(number)) for number in count())


@pytest.fixture
def repo(repos):
    return next(repos)


@pytest.fixture
def engine():
    from dirtylog.fleet import Threads

    with Threads(3) as engine:
        yield engine
