"""What the tests of fleets share: a repository, and an engine of threads."""

from itertools import count

import pytest

from ..stores import icechunk, no_thread_is_left_behind, s3

__all__ = ["icechunk", "no_thread_is_left_behind", "s3"]


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
