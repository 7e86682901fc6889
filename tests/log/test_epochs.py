"""One observer: what is in an epoch, and what becomes of it when its block ends."""

import gc
import threading

import pytest

import dirtylog as dl


@pytest.fixture
def source():
    return dl.DirtyBitmap(1000)


@pytest.fixture
def log(source):
    log = dl.DirtyLog()
    log.attach(source)
    return log


@pytest.fixture
def observer(log):
    return log.observer("backup")


def collected(observer):
    with observer.collect() as epoch:
        return epoch.pages.indices().tolist()


def test_an_epoch_holds_what_was_written_since_the_last(source, observer):
    source.mark_pages([3, 999])
    assert collected(observer) == [3, 999]
    source.mark(4)
    assert collected(observer) == [4]
    assert collected(observer) == []


def test_an_epoch_speaks_of_the_whole_page_space(observer):
    with observer.collect() as epoch:
        assert (epoch.pages.npages, epoch.pages.page_size, epoch.pages.exact) == (1000, 4096, True)
        assert epoch.observer is observer


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_an_exception_puts_the_pages_back(source, observer, error):
    source.mark(3)
    with pytest.raises(error), observer.collect():
        raise error
    source.mark(5)
    assert collected(observer) == [3, 5]


def test_a_generator_that_is_closed_inside_the_block_puts_the_pages_back(source, observer):
    def consume():
        with observer.collect() as epoch:
            yield epoch.pages

    source.mark(3)
    consumer = consume()
    assert next(consumer).count == 1
    consumer.close()
    assert collected(observer) == [3]


def test_leaving_by_return_and_break_commits(source, observer):
    source.mark(3)
    assert collected(observer) == [3]
    source.mark(4)
    for _ in range(1):
        with observer.collect():
            break
    assert collected(observer) == []


def test_committed_epochs_are_numbered_without_a_gap(observer):
    numbers = []
    for fails in (False, True, True, False):
        with pytest.raises(ZeroDivisionError) if fails else observer.collect() as epoch:
            if fails:
                with observer.collect() as epoch:
                    numbers.append(epoch.number)
                    raise ZeroDivisionError
            numbers.append(epoch.number)
    assert numbers == [1, 2, 2, 2]


def test_every_observer_numbers_its_own(log, observer):
    collected(observer)
    with observer.collect() as second, log.observer("other").collect() as first:
        assert (second.number, first.number) == (2, 1)


def test_one_observer_holds_one_epoch(source, observer):
    source.mark(3)
    with observer.collect() as epoch:
        with pytest.raises(dl.DirtyLogError, match="holds epoch 1 already"), observer.collect():
            pytest.fail("entered")
        source.mark(4)
        assert epoch.pages.indices().tolist() == [3]
    assert collected(observer) == [4]


def test_an_epoch_is_entered_once(source, observer):
    epoch = observer.collect()
    source.mark(3)
    with epoch:
        with pytest.raises(dl.DirtyLogError, match="entered once"), epoch:
            pytest.fail("entered")
        # The attempt has not ended the epoch that is open.
        with pytest.raises(dl.DirtyLogError, match="holds"), observer.collect():
            pytest.fail("entered")
    with pytest.raises(dl.DirtyLogError, match="entered once"), epoch:
        pytest.fail("entered")
    assert epoch.pages.indices().tolist() == [3]
    assert collected(observer) == []


def test_an_epoch_that_was_not_entered_takes_nothing(source, observer):
    source.mark(3)
    epoch = observer.collect()
    with pytest.raises(dl.DirtyLogError, match="not entered"):
        _ = epoch.pages
    with pytest.raises(dl.DirtyLogError, match="no number"):
        _ = epoch.number
    assert "not entered" in repr(epoch)
    assert collected(observer) == [3]


def test_an_epoch_that_is_dropped_in_mid_air_is_put_back(source, observer):
    source.mark(3)
    epoch = observer.collect()
    epoch.__enter__()
    del epoch
    gc.collect()
    assert collected(observer) == [3]


def test_the_pages_outlive_the_block(source, observer):
    source.mark(3)
    with observer.collect() as epoch:
        pass
    source.mark(4)
    assert epoch.pages.indices().tolist() == [3]
    assert "Epoch 1 of 'backup'" in repr(epoch)


def test_an_inexact_harvest_makes_every_observer_inexact_until_delivered(log, observer):
    class Lost:
        npages, page_size = 1000, 4096

        def harvest(self):
            exact, self.exact = getattr(self, "exact", False), True
            return dl.DirtyPages._empty(1000) if exact else dl.DirtyPages._all(1000)

    log.attach(Lost())
    other = log.observer("other")
    with pytest.raises(ZeroDivisionError), observer.collect() as epoch:  # noqa: PT012
        assert not epoch.pages.exact
        raise ZeroDivisionError
    for each in (observer, other):
        with each.collect() as epoch:
            assert (epoch.pages.count, epoch.pages.exact) == (1000, False)
        with each.collect() as epoch:
            assert (epoch.pages.count, epoch.pages.exact) == (0, True)


def test_pages_of_committed_epochs_can_be_put_back(source, observer):
    source.mark_pages([1, 2])
    with observer.collect() as first:
        pass
    source.mark(700)
    observer.put_back(first.pages)
    assert collected(observer) == [1, 2, 700]
    observer.put_back(dl.DirtyPages.from_indices([7], 100, exact=False))
    with observer.collect() as epoch:
        assert (list(epoch.pages), epoch.pages.exact) == ([7], False)


def test_put_back_refuses_what_is_not_of_this_page_space(observer):
    with pytest.raises(TypeError, match="must be DirtyPages"):
        observer.put_back([1])
    with pytest.raises(IndexError, match="1001 pages and the log has 1000"):
        observer.put_back(dl.DirtyPages._empty(1001))
    with pytest.raises(ValueError, match="page"):
        observer.put_back(dl.DirtyPages.from_indices([1], 1000, 8192))


def test_a_closed_observer_refuses_and_is_forgotten(log, source, observer):
    with observer:
        assert not observer.closed
    observer.close()
    assert observer.closed
    assert log.observers == ()
    for refused in (lambda: observer.collect().__enter__(), lambda: observer.put_back(dl.DirtyPages._empty(1000))):
        with pytest.raises(ValueError, match="is closed"):
            refused()
    assert log.observer("backup") is not observer


def test_an_epoch_may_outlive_its_observer(source, observer):
    source.mark(3)
    with pytest.raises(ZeroDivisionError), observer.collect() as epoch:  # noqa: PT012
        observer.close()
        assert list(epoch.pages) == [3]
        raise ZeroDivisionError


def test_nobody_waits_for_the_block_of_another(log, source, observer):
    """A thread collects, attaches and makes observers while this one is inside its block."""
    done = []

    def others():
        log.attach(dl.DirtyBitmap(10), first_page=1000)
        done.append(collected(log.observer("other")))

    with observer.collect():
        source.mark(8)
        thread = threading.Thread(target=others)
        thread.start()
        thread.join(60)
        assert done == [[8]]
    assert collected(observer) == [8]


def test_pages_of_another_size_are_refused_and_the_next_epoch_stays_exact(observer):
    with pytest.raises(ValueError, match="pages are of 8192 bytes and the log has 4096"):
        observer.put_back(dl.DirtyPages.from_indices([1], 1000, 8192, exact=False))
    with observer.collect() as epoch:
        assert epoch.pages.exact


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, as a list of one time that a test sets."""
    from dirtylog import epochs
    from dirtylog._log import account

    now = [100.0]
    monkeypatch.setattr(account, "monotonic", lambda: now[0])
    monkeypatch.setattr(epochs.time, "monotonic", lambda: now[0])
    return now


def test_whoever_finds_an_epoch_held_is_told_for_whom(observer):
    held = observer.collect(owner="upload 17")
    with held:
        assert observer.epoch.owner == "upload 17"
        with pytest.raises(dl.DirtyLogError, match="holds epoch 1 already for upload 17;"), observer.collect():
            pass
    with observer.collect() as epoch:
        assert epoch.owner == ""


def test_an_epoch_is_held_until_its_deadline_and_then_taken_over(source, observer, clock):
    source.mark(3)
    held = observer.collect(deadline=30).__enter__()
    clock[0] += 29.9
    assert not held.overdue
    with pytest.raises(dl.DirtyLogError, match="holds epoch 1 already"), observer.collect():
        pass
    clock[0] += 0.1
    assert held.overdue
    source.mark(5)
    with observer.collect() as epoch:
        assert epoch.pages.indices().tolist() == [3, 5]
        assert epoch.number == 1
        with pytest.raises(dl.DirtyLogError, match="is not open"):
            held.commit()
    assert collected(observer) == []


def test_an_overdue_epoch_that_nobody_took_over_can_be_committed(source, observer, clock):
    source.mark(3)
    held = observer.collect(deadline=30).__enter__()
    clock[0] += 1000
    held.commit()
    assert collected(observer) == []


def test_the_time_of_an_epoch_begins_when_it_is_entered(source, observer, clock):
    waiting = observer.collect(deadline=30)
    clock[0] += 1000
    with waiting:
        assert not waiting.overdue


@pytest.mark.parametrize("deadline", [0, -1, float("nan")])
def test_a_deadline_that_is_none_is_refused(observer, deadline):
    with pytest.raises(ValueError, match="seconds above 0"):
        observer.collect(deadline=deadline)
    with pytest.raises(TypeError):
        observer.collect(owner=17)
