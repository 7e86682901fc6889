"""A log under signals: collects in handlers, and interrupts before every bytecode; nothing lost, nothing stuck."""

import gc
import os
import signal
import warnings

import numpy as np
import pytest

import dirtylog as dl

pytestmark = [
    pytest.mark.thread_unsafe(reason="signals and traces belong to the process"),
    pytest.mark.filterwarnings("ignore::dirtylog.IncompleteLogWarning"),
]
FILES = ("log.py", "epochs.py")


class Interrupting:
    """A source that sends a signal in the middle of its harvest, after it has taken its pages."""

    npages, page_size = 10, 4096

    def __init__(self):
        self.bitmap = dl.DirtyBitmap(10)
        self.send = True

    def harvest(self):
        pages = self.bitmap.harvest()
        if self.send:
            self.send = False
            os.kill(os.getpid(), signal.SIGUSR2)
        return pages


@pytest.fixture
def on_signal():
    """Set what SIGUSR2 calls."""
    before = signal.getsignal(signal.SIGUSR2)
    yield lambda call: signal.signal(signal.SIGUSR2, lambda *_: call())
    signal.signal(signal.SIGUSR2, before)


class Wrong:
    """A source whose first answer is none."""

    npages, page_size = 10, 4096

    def __init__(self):
        self.answers = [[]]

    def harvest(self):
        return self.answers.pop() if self.answers else dl.DirtyPages.from_indices([], 10)


def collected(observer):
    with observer.collect() as epoch:
        return set(epoch.pages.indices().tolist())


# ---- handlers and finalizers ---------------------------------------------------------


def test_a_last_checkpoint_in_a_signal_handler_has_what_the_interrupted_harvest_took(on_signal):
    log, source = dl.DirtyLog(), Interrupting()
    log.attach(source)
    main, last = log.observer("main"), log.observer("last")
    source.bitmap.mark(3)
    checkpoint = []
    on_signal(lambda: checkpoint.append(collected(last)))
    assert 3 in collected(main)
    assert checkpoint == [set(range(10))]
    assert collected(last) >= {3}
    assert collected(main) == set()


def test_a_handler_that_collects_and_exits_loses_nothing(on_signal):
    log, source = dl.DirtyLog(), Interrupting()
    log.attach(source)
    main, last = log.observer("main"), log.observer("last")
    source.bitmap.mark(3)

    def checkpoint():
        assert 3 in collected(last)
        raise SystemExit

    on_signal(checkpoint)
    with pytest.raises(SystemExit):
        collected(main)
    assert 3 in collected(main)


def test_a_handler_that_collects_with_the_observer_it_interrupted_is_told_so(on_signal):
    log, source = dl.DirtyLog(), dl.DirtyBitmap(10)
    log.attach(source)
    observer = log.observer("main")
    said = []

    def collect():
        with pytest.raises(dl.DirtyLogError, match=r"holds epoch 1 already.*rollback"):
            collected(observer)
        said.append(True)

    on_signal(collect)
    with observer.collect():
        os.kill(os.getpid(), signal.SIGUSR2)
    assert said == [True]


def test_a_handler_may_collect_with_the_observer_whose_collect_it_interrupts(on_signal):
    log, source = dl.DirtyLog(), Interrupting()
    log.attach(source)
    observer = log.observer("main")
    source.bitmap.mark(3)
    inner = []
    on_signal(lambda: inner.append(collected(observer)))
    outer = collected(observer)
    assert 3 in inner[0]
    assert 3 in outer


def test_a_finalizer_may_close_an_observer_during_a_collect():
    log = dl.DirtyLog()

    class Closes:
        def __del__(self):
            first.close()

    class Source(Interrupting):
        def harvest(self):
            Closes()
            gc.collect()
            return self.bitmap.harvest()

    source = Source()
    log.attach(source)
    first, second, third = (log.observer(name) for name in ("first", "second", "third"))
    source.bitmap.mark(4)
    assert collected(third) == {4}
    assert collected(second) == {4}
    assert first.closed


# ---- ways out -----------------------------------------------------------------------


def test_an_epoch_can_be_committed_and_rolled_back_without_a_block():
    log, source = dl.DirtyLog(), dl.DirtyBitmap(10)
    log.attach(source)
    observer = log.observer("one")
    source.mark(3)
    epoch = observer.collect().__enter__()
    assert observer.epoch is epoch
    epoch.rollback()
    assert observer.epoch is None
    epoch = observer.collect().__enter__()
    assert (epoch.number, epoch.pages.indices().tolist()) == (1, [3])
    epoch.commit()
    for end in (epoch.commit, epoch.rollback, observer.collect().commit):
        with pytest.raises(dl.DirtyLogError, match="is not open"):
            end()
    with observer.collect() as epoch:
        assert (epoch.number, epoch.pages.count) == (2, 0)


def test_a_commit_within_the_block_makes_its_end_change_nothing():
    log, source = dl.DirtyLog(), dl.DirtyBitmap(10)
    log.attach(source)
    observer = log.observer("one")
    source.mark(3)
    epoch = observer.collect().__enter__()
    epoch.commit()
    error = KeyError()
    epoch.__exit__(KeyError, error, None)
    assert collected(observer) == set()


# ---- before every bytecode -------------------------------------------------------------


def test_a_collect_interrupted_anywhere_loses_no_page_and_leaves_nothing_stuck(interrupted_at):
    place, interrupted = 0, True
    while interrupted:
        log, source = dl.DirtyLog(), dl.DirtyBitmap(64)
        log.attach(source)
        observer, other = log.observer("one"), log.observer("other")
        source.mark(7)
        seen = set()

        def consume(observer=observer, seen=seen):
            with observer.collect() as epoch:
                seen |= set(epoch.pages.indices().tolist())

        interrupted = interrupted_at(place, consume, FILES)
        assert observer.epoch is None, place
        assert 7 in seen | collected(observer), place
        assert 7 in collected(other), place
        place += 1
    assert place > 20


def test_an_attach_interrupted_anywhere_leaves_observers_of_one_size(interrupted_at):
    place, interrupted = 0, True
    while interrupted:
        log, source, more = dl.DirtyLog(), dl.DirtyBitmap(64), dl.DirtyBitmap(64)
        log.attach(source)
        observers = [log.observer("one"), log.observer("two")]
        source.mark(7)
        collected(log.observer("three"))
        interrupted = interrupted_at(place, lambda log=log, more=more: log.attach(more, first_page=64), FILES)
        if more not in [attachment.source for attachment in log.sources]:
            log.attach(more, first_page=64)
        more.mark(1)
        for observer in [*observers, log.observer("new")]:
            with observer.collect() as epoch:
                assert epoch.pages.npages == log.npages == 128, place
        for observer in observers:
            observer.put_back(dl.DirtyPages.from_indices([100], 128))
            assert collected(observer) == {100}
        place += 1
    assert place > 100


@pytest.mark.parametrize("verb", ["commit", "rollback", "put_back", "close", "detach"])
def test_every_other_call_interrupted_anywhere_can_be_made_again(interrupted_at, verb):
    place, interrupted = 0, True
    while interrupted:
        log, source = dl.DirtyLog(), dl.DirtyBitmap(64)
        log.attach(source)
        observer = log.observer("one")
        source.mark(7)
        epoch = observer.collect().__enter__()
        call = {
            "commit": epoch.commit,
            "rollback": epoch.rollback,
            "put_back": lambda observer=observer: observer.put_back(dl.DirtyPages.from_indices([9], 64)),
            "close": observer.close,
            "detach": lambda log=log, source=source: log.detach(source),
        }[verb]
        interrupted = interrupted_at(place, call, FILES)
        if verb in ("commit", "rollback"):
            if observer.epoch is not None:
                call()
            assert collected(observer) == ({7} if verb == "rollback" else set()), place
        elif verb == "put_back":
            call()
            epoch.commit()
            assert collected(observer) == {9}, place
        elif verb == "close":
            call()
            assert observer.closed
            assert log.observers == ()
        else:
            if log.sources:
                call()
            epoch.rollback()
            assert 7 in collected(observer), place
        place += 1
    assert place > 5


def test_the_end_of_a_block_runs_no_bytecode_of_the_library(interrupted_at):
    """So that no signal handler runs before it has ended the epoch."""
    log = dl.DirtyLog()
    log.attach(dl.DirtyBitmap(10))
    observer = log.observer("one")
    epoch = observer.collect().__enter__()
    assert not interrupted_at(0, lambda: epoch.__exit__(None, None, None))
    assert observer.epoch is None
    assert np.array_equal(epoch.pages.indices(), [])


def test_a_warning_that_is_an_error_rolls_the_epoch_back():
    log, source = dl.DirtyLog(), Wrong()
    log.attach(source)
    observer = log.observer("one")
    with pytest.raises(TypeError):
        collected(observer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(dl.IncompleteLogWarning):
            collected(observer)
    assert collected(observer) == set(range(10))
