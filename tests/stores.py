"""Fixtures of every test that meets Zarr and Icechunk: the package, and the threads that such packages keep."""

import threading

import pytest


@pytest.fixture
def icechunk():
    """The package, which says what is an error alone."""
    package = pytest.importorskip("icechunk")
    package.set_logs_filter("error")
    return package


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    """In place of the suite's: zarr keeps its threads for the next call, and so do servers, clients and Dask."""
    before = set(threading.enumerate())
    yield
    left = [each for each in threading.enumerate() if each not in before and each.name.startswith("dirtylog")]
    assert not left, f"still running: {left}"
