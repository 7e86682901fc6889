"""What the tests of stores share: memory with a log, a repository, and one that fails."""

from contextlib import ExitStack

import pytest

import dirtylog as dl

from ...stores import icechunk, no_thread_is_left_behind, s3

__all__ = ["icechunk", "no_thread_is_left_behind", "s3"]


@pytest.fixture
def repo(icechunk):
    from dirtylog.sinks.store import repository

    return repository("memory://")


@pytest.fixture
def tracked():
    """Track arrays, one after the other in the page space of one log; return an observer of them."""
    with ExitStack() as stack:

        def track(arrays):
            log, first_page = dl.DirtyLog(), 0
            for array in arrays.values():
                tracker = stack.enter_context(dl.track(array))
                log.attach(tracker, first_page)
                first_page += tracker.npages
            return log.observer("store")

        yield track


class Flaky:
    """A repository whose calls are counted, and of which one fails: before it is done, or after it was done.

    Parameters
    ----------
    repo : icechunk.Repository
        What does the work.
    fail : int
        Which call fails, from 1 on; 0 for none.
    after : bool
        Whether it is done all the same: the answer is lost.
    silent : int
        How many calls after that fail too, without being done.
    """

    def __init__(self, repo, fail=0, after=False, silent=0):
        self.repo, self.fail, self.after, self.silent, self.calls = repo, fail, after, silent, 0

    def call(self, work, *args, **options):
        self.calls += 1
        if not self.fail <= self.calls <= self.fail + self.silent or not self.fail:
            return work(*args, **options)
        if self.after and self.calls == self.fail:
            work(*args, **options)
        raise OSError(f"the store does not answer call {self.calls}")

    def ancestry(self, **options):
        return self.call(self.repo.ancestry, **options)

    def writable_session(self, branch):
        return FlakySession(self, self.call(self.repo.writable_session, branch))

    def __getattr__(self, name):
        return getattr(self.repo, name)


class FlakySession:
    def __init__(self, flaky, session):
        self.flaky, self.session = flaky, session

    @property
    def store(self):
        return self.flaky.call(lambda: self.session.store)

    def commit(self, *args, **options):
        return self.flaky.call(self.session.commit, *args, **options)

    def __getattr__(self, name):
        return getattr(self.session, name)


@pytest.fixture
def flaky():
    return Flaky


def write_at_random(rng, arrays):
    """Write a few items of some arrays."""
    for array in arrays.values():
        for _ in range(int(rng.integers(0, 3))):
            place = tuple(int(rng.integers(0, size)) for size in array.shape)
            array[place] = rng.integers(0, 100)


def same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()


@pytest.fixture
def at_random():
    return write_at_random


@pytest.fixture
def equal():
    return same
