"""Sources that keep what they have handed out: told when every observer has committed it, and never before."""

import pytest

import dirtylog as dl


class Leased:
    """A bitmap that notes which of its harvests were released."""

    def __init__(self, npages=100):
        self.bitmap = dl.DirtyBitmap(npages)
        self.npages, self.page_size = npages, 4096
        self.lease = 0
        self.released = []
        self.refuses = None

    def harvest(self):
        pages = self.bitmap.harvest()
        self.lease += 1
        return pages

    def release_lease(self, lease):
        if self.refuses:
            raise self.refuses
        self.released.append(lease)


@pytest.fixture
def source():
    return Leased()


@pytest.fixture
def log(source):
    made = dl.DirtyLog()
    made.attach(source)
    return made


def test_a_commit_releases_and_a_rollback_does_not(log, source):
    observer = log.observer("backup")
    with pytest.raises(ZeroDivisionError), observer.collect():
        _ = 1 / 0
    assert source.released == []
    with observer.collect():
        assert source.released == []
    assert source.released == [1, 2]
    epoch = observer.collect().__enter__()
    epoch.rollback()
    epoch = observer.collect().__enter__()
    epoch.commit()
    assert source.released == [1, 2, 3, 4]


def test_the_slowest_observer_decides(log, source):
    fast, slow = log.observer("fast"), log.observer("slow")
    for _ in range(2):
        with fast.collect():
            pass
    assert source.released == []
    with slow.collect():
        # Harvested while the slow one holds its epoch: not in it.
        with fast.collect():
            pass
        assert source.released == []
    assert source.released == [1, 2, 3]
    with slow.collect():
        pass
    with fast.collect():
        pass
    assert source.released == [1, 2, 3, 4, 5]


def test_what_one_observer_rolled_back_is_not_released_by_a_commit_of_another(log, source):
    first, second = log.observer("first"), log.observer("second")
    first.collect().__enter__().rollback()
    with second.collect():
        pass
    assert source.released == []
    with first.collect():
        pass
    assert source.released == [1, 2]


def test_an_observer_that_comes_later_is_owed_nothing_of_what_was_before(log, source):
    first = log.observer("first")
    epoch = first.collect().__enter__()
    log.observer("late")
    epoch.commit()
    assert source.released == [1]


def test_what_an_observer_leaves_uncommitted_is_never_released(log, source):
    leaver, stayer = log.observer("leaver"), log.observer("stayer")
    with leaver.collect():
        pass
    with stayer.collect():
        pass
    assert source.released == [1]  # the second was harvested for the leaver as well
    leaver.close()
    with stayer.collect():
        pass
    assert source.released == [1, 3]
    held = stayer.collect().__enter__()
    stayer.close()
    held._leave(True)
    assert source.released == [1, 3]


def test_an_epoch_that_is_dropped_releases_nothing(log, source):
    observer = log.observer("backup")
    epoch = observer.collect().__enter__()
    del epoch
    assert source.released == []
    with observer.collect():
        pass
    assert source.released == [1, 2]


def test_a_release_that_fails_leaves_the_epoch_committed_and_is_said(log, source):
    observer = log.observer("backup")
    other = Leased()
    log.attach(other, first_page=100)
    source.bitmap.mark(5)
    source.refuses = OSError("gone")
    epoch = observer.collect()
    with pytest.raises(OSError, match="gone") as failure, epoch:
        pass
    assert failure.value.__notes__ == ["the epoch has been committed all the same"]
    assert other.released == [1]
    assert observer.epoch is None
    source.refuses = None
    with observer.collect() as epoch:
        assert (epoch.number, epoch.pages.count) == (2, 0)


def test_a_source_that_is_detached_hears_of_its_last_harvest(log, source):
    observer = log.observer("backup")
    log.detach(source)
    assert source.released == []
    with observer.collect():
        pass
    assert source.released == [1]


def test_a_harvest_that_failed_has_no_lease(log, source):
    observer = log.observer("backup")
    harvest, source.harvest = source.harvest, lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        observer.collect().__enter__()
    source.harvest = harvest
    with pytest.warns(dl.IncompleteLogWarning), observer.collect():
        pass
    assert source.released == [1]
