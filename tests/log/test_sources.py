"""Many sources, many observers: the page space, late comers, sources that fail and sources that leave."""

import pytest

import dirtylog as dl


class Failing:
    """A bitmap whose harvest fails as often as told, and loses its bits each time, as a broken source may."""

    page_size = 4096

    def __init__(self, npages, failures=1, error=None):
        self.bitmap, self.npages = dl.DirtyBitmap(npages), npages
        self.failures, self.error = failures, error or OSError("gone")

    def harvest(self):
        pages = self.bitmap.harvest()
        if self.failures:
            self.failures -= 1
            raise self.error
        return pages


def collected(observer):
    with observer.collect() as epoch:
        return epoch.pages.indices().tolist()


def test_sources_are_merged_where_they_lie():
    log, low, high = dl.DirtyLog(), dl.DirtyBitmap(100), dl.DirtyBitmap(77)
    log.attach(low)
    log.attach(high, first_page=61)
    observer = log.observer("all")
    assert (log.npages, log.page_size, observer.npages, observer.page_size, observer.log) == (138, 4096, 138, 4096, log)
    low.mark_pages([0, 99])
    high.mark_pages([0, 38, 76])
    assert collected(observer) == [0, 61, 99, 137]


def test_one_collect_harvests_every_source_once_for_everybody():
    log, source = dl.DirtyLog(), Failing(100, failures=0)
    log.attach(source)
    observers = [log.observer(str(i)) for i in range(3)]
    source.bitmap.mark(5)
    assert collected(observers[0]) == [5]
    assert not source.bitmap.count()
    assert collected(observers[1]) == [5]
    assert collected(observers[2]) == [5]


def test_a_late_observer_sees_what_is_harvested_after_it_was_made():
    log, source = dl.DirtyLog(), dl.DirtyBitmap(100)
    log.attach(source)
    early = log.observer("early")
    source.mark(1)
    collected(early)
    source.mark(2)
    late = log.observer("late")
    source.mark(3)
    assert collected(late) == [2, 3]
    assert collected(early) == [2, 3]


def test_an_observer_can_start_with_everything_that_is_attached():
    log = dl.DirtyLog()
    log.attach(dl.DirtyBitmap(2), first_page=1)
    log.attach(dl.DirtyBitmap(2), first_page=6)
    observer = log.observer("copy", everything=True)
    with observer.collect() as epoch:
        assert (list(epoch.pages), epoch.pages.exact) == ([1, 2, 6, 7], True)
    assert collected(observer) == []


def test_a_source_attached_later_makes_the_page_space_larger():
    log, first, second = dl.DirtyLog(), dl.DirtyBitmap(70), dl.DirtyBitmap(40_000)
    early = log.observer("early")
    assert collected(early) == []
    log.attach(first)
    first.mark(69)
    with pytest.raises(ZeroDivisionError), early.collect():  # noqa: PT012
        log.attach(second, first_page=200)
        second.mark_pages([0, 39_999])
        raise ZeroDivisionError
    assert collected(early) == [69, 200, 40_199]
    assert log.npages == 40_200


def test_what_is_pending_survives_growth():
    log, source = dl.DirtyLog(), dl.DirtyBitmap(70)
    log.attach(source)
    one, two = log.observer("one"), log.observer("two")
    source.mark(69)
    collected(one)
    log.attach(dl.DirtyBitmap(50), first_page=70)
    assert collected(two) == [69]


def test_an_empty_log_takes_the_page_size_of_its_first_source():
    log = dl.DirtyLog()
    observer = log.observer("early")
    with observer.collect() as epoch:
        assert (epoch.pages.npages, epoch.pages.page_size) == (0, 4096)
        source = dl.DirtyBitmap(10, 65536)
        log.attach(source)
    source.mark(3)
    with observer.collect() as epoch:
        assert (list(epoch.pages), epoch.pages.page_size) == ([3], 65536)


def test_attaching_can_report_everything_to_the_observers_there_are():
    log = dl.DirtyLog()
    log.attach(dl.DirtyBitmap(10))
    observer = log.observer("copy")
    log.attach(dl.DirtyBitmap(3), first_page=20, everything=True)
    assert collected(observer) == [20, 21, 22]


def test_attach_refuses_before_anything_has_changed():
    log, source = dl.DirtyLog(), dl.DirtyBitmap(10)
    log.attach(source, name="ram")
    refusals = [
        (ValueError, "pages of 8192 bytes and the log has 4096", lambda: log.attach(dl.DirtyBitmap(10, 8192))),
        (ValueError, "attached already, as 'ram'", lambda: log.attach(source, first_page=5)),
        (ValueError, "a source 'ram' already", lambda: log.attach(dl.DirtyBitmap(10), name="ram")),
        (IndexError, "first_page is -1", lambda: log.attach(dl.DirtyBitmap(10), first_page=-1)),
        (ValueError, "npages", lambda: log.attach(dl.DirtyBitmap(10), first_page=1 << 52)),
        (TypeError, "int is not a source", lambda: log.attach(3)),
        (TypeError, "cannot be interpreted as an integer", lambda: log.attach(dl.DirtyBitmap(10), first_page="0")),
    ]
    for kind, message, attempt in refusals:
        with pytest.raises(kind, match=message):
            attempt()
    assert [(each.source, each.first_page, each.npages) for each in log.sources] == [(source, 0, 10)]
    assert log.npages == 10


def test_an_observer_needs_a_name_of_its_own():
    log = dl.DirtyLog()
    observer = log.observer("backup")
    with pytest.raises(ValueError, match="observer 'backup' already"):
        log.observer("backup")
    with pytest.raises(TypeError, match="must be a string"):
        log.observer(3)
    assert log.observers == (observer,)
    assert "1 observers" in repr(log)
    assert "backup" in repr(observer)


def test_a_source_that_fails_loses_nothing_that_others_reported():
    log, before, broken, after = dl.DirtyLog(), dl.DirtyBitmap(10), Failing(10), dl.DirtyBitmap(10)
    for i, source in enumerate((before, broken, after)):
        log.attach(source, first_page=10 * i, name=f"source {i}")
    one, two = log.observer("one"), log.observer("two")
    before.mark(1)
    broken.bitmap.mark(2)
    after.mark(3)
    with pytest.raises(OSError, match="gone") as caught, one.collect():
        pytest.fail("entered")
    assert "source 'source 1' failed" in caught.value.__notes__[0]
    # I6: nobody knows which bits of the broken source are gone, so all its pages are dirty.
    epoch = one.collect()
    with pytest.warns(dl.IncompleteLogWarning, match="'source 1' failed earlier: all its 10 pages"):
        epoch.__enter__()
    assert list(epoch.pages) == [1, *range(10, 20), 23]
    assert not epoch.pages.exact
    assert epoch.number == 1
    epoch.__exit__(None, None, None)
    with two.collect() as epoch:
        assert list(epoch.pages) == [1, *range(10, 20), 23]
        assert not epoch.pages.exact
    with one.collect() as epoch:
        assert not epoch.pages
        assert epoch.pages.exact


def test_a_warning_that_is_an_error_loses_nothing():
    """With filterwarnings=error the collect that warns fails: its pages are still there for the next."""
    log, broken = dl.DirtyLog(), Failing(10)
    log.attach(broken)
    observer = log.observer("one")
    with pytest.raises(OSError, match="gone"), observer.collect():
        pytest.fail("entered")
    with pytest.raises(dl.IncompleteLogWarning), observer.collect():
        pytest.fail("entered")
    with observer.collect() as epoch:
        assert (epoch.pages.count, epoch.pages.exact) == (10, False)


def test_an_interrupted_harvest_is_a_failed_one():
    log, broken = dl.DirtyLog(), Failing(10, error=KeyboardInterrupt())
    log.attach(broken, first_page=5)
    observer = log.observer("one")
    with pytest.raises(KeyboardInterrupt), observer.collect():
        pytest.fail("entered")
    with pytest.warns(dl.IncompleteLogWarning), observer.collect() as epoch:
        assert list(epoch.pages) == list(range(5, 15))


def test_an_answer_of_another_size_is_a_failure():
    log, source = dl.DirtyLog(), Failing(10, failures=0)
    log.attach(source)
    source.bitmap = dl.DirtyBitmap(11)
    observer = log.observer("one")
    with pytest.raises(dl.DirtyLogError, match="answered for 11 pages and was attached with 10"), observer.collect():
        pytest.fail("entered")


def test_a_source_is_harvested_a_last_time_when_it_leaves():
    log, source, stays = dl.DirtyLog(), dl.DirtyBitmap(10), dl.DirtyBitmap(4)
    log.attach(source)
    log.attach(stays)
    observer = log.observer("one")
    source.mark(7)
    log.detach(source)
    assert not source.count()
    assert [each.source for each in log.sources] == [stays]
    assert collected(observer) == [7]
    source.mark(8)
    assert collected(observer) == []
    assert log.npages == 10
    with pytest.raises(ValueError, match="not attached"):
        log.detach(source)


def test_a_source_that_fails_as_it_leaves_is_all_dirty():
    log, source = dl.DirtyLog(), Failing(10, failures=-1)
    log.attach(source, first_page=2)
    observer = log.observer("one")
    with pytest.warns(dl.IncompleteLogWarning, match="last harvest .* failed .OSError: gone"):
        log.detach(source)
    assert log.sources == ()
    with observer.collect() as epoch:
        assert list(epoch.pages) == list(range(2, 12))
        assert not epoch.pages.exact


def _no_memory():
    raise MemoryError


def test_an_attach_without_memory_for_the_second_observer_leaves_the_first_as_it_was(monkeypatch):
    log, source = dl.DirtyLog(), dl.DirtyBitmap(100)
    log.attach(source)
    first, second = log.observer("first"), log.observer("second")
    source.mark(5)
    collected(second)
    room = [dl.DirtyBitmap(200)]
    monkeypatch.setattr("dirtylog.log.DirtyBitmap", lambda *_: room.pop() if room else _no_memory())
    with pytest.raises(MemoryError):
        log.attach(dl.DirtyBitmap(100), first_page=100)
    assert (log.npages, len(log.sources)) == (100, 1)
    with first.collect() as epoch:
        assert (epoch.pages.npages, epoch.pages.indices().tolist()) == (100, [5])
