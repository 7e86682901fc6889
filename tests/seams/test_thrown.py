"""I5, after the return: an answer that an exception throws away before anybody has stored it is its source's again."""

import contextlib
import gc
import mmap
import pickle
import signal
import warnings

import numpy as np
import pytest

import dirtylog as dl
from dirtylog._bits.owed import Owed, take_all

PAGE = 4096
PAGES = [0, 5, 63]


class ThrownError(Exception):
    """Raised while an answer lies on the interpreter's stack, as a signal handler would."""


def fail():
    raise ThrownError


def throw(take, *arguments):
    """Call `take`, and have an exception throw its answer away."""
    with pytest.raises(ThrownError):
        print(take(*arguments), fail())


@contextlib.contextmanager
def bitmap():
    source = dl.DirtyBitmap(64)
    yield source.mark_pages, source.harvest


@contextlib.contextmanager
def foreign_bitmap():
    source = dl.DirtyBitmap.from_buffer(bytearray(8))
    yield source.mark_pages, source.harvest


@contextlib.contextmanager
def shared_log():
    with dl.SharedLog.create(64) as source:
        yield source.mark_pages, source.harvest


def tracker(backend):
    @contextlib.contextmanager
    def opened():
        array = dl.zeros((64, PAGE), np.uint8)
        array[:] = 1

        def write(pages):
            array[pages, 0] += 1

        with dl.track(array, backend) as source:
            yield write, source.harvest

    return opened


@contextlib.contextmanager
def model(**options):
    vm = dl.VM(**options)
    vm.set_memory_region(0, base_gfn=0, npages=64)
    yield vm.vcpus[0].touch, vm.slot(0).harvest


@contextlib.contextmanager
def model_with_rings():
    with model(dirty_ring=4096) as source:
        yield source


@contextlib.contextmanager
def owed():
    source = dl.DirtyBitmap(64)
    keeper = Owed(64)
    # What a source of another kind gives: an answer that nobody takes back but the keeper.
    yield source.mark_pages, lambda: keeper.take(lambda: source.harvest() | dl.DirtyPages.from_indices([], 64))


SOURCES = {
    "bitmap": bitmap,
    "foreign bitmap": foreign_bitmap,
    "shared log": shared_log,
    "compare": tracker("compare"),
    "mprotect": tracker("mprotect"),
    "model": model,
    "model with rings": model_with_rings,
    "owed": owed,
}
with contextlib.suppress(dl.BackendUnavailable):
    dl.track(dl.zeros(PAGE), "userfaultfd").close()
    SOURCES["userfaultfd"] = tracker("userfaultfd")

each_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())


@each_source
def test_an_answer_that_an_exception_throws_away_is_in_the_next_one(source):
    with source() as (write, harvest):
        write(PAGES)
        throw(harvest)
        write([7])
        answer = harvest()
        assert answer.indices().tolist() == sorted([*PAGES, 7])
        assert answer.exact
        assert harvest().count == 0


@each_source
def test_an_answer_that_its_owner_drops_is_not_reported_again(source):
    with source() as (write, harvest):
        write(PAGES)
        harvest()
        assert harvest().count == 0


@pytest.mark.thread_unsafe(reason="signals belong to the process")
def test_a_handler_that_raises_before_the_answer_is_stored_loses_nothing():
    source = dl.DirtyBitmap(64)
    source.mark_pages(PAGES)
    before = signal.signal(signal.SIGUSR2, lambda *_: fail())
    try:
        with pytest.raises(ThrownError):
            print(source.harvest(), signal.raise_signal(signal.SIGUSR2))
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert source.harvest().indices().tolist() == PAGES


def test_an_answer_that_its_owner_has_stored_is_the_owners():
    source = dl.DirtyBitmap(64)
    source.mark_pages(PAGES)
    pages = source.harvest()
    with pytest.raises(ThrownError):
        print(pages, fail())
    assert pages.indices().tolist() == PAGES
    assert source.harvest().count == 0


def test_a_part_that_is_thrown_away_keeps_its_page_numbers():
    source = dl.DirtyBitmap(4096)
    source.mark_pages([1, 3000])
    throw(source.harvest, 2000, 2000)
    assert source.harvest(2000, 2000).indices().tolist() == [3000]
    assert source.harvest().indices().tolist() == [1]


def test_a_dense_answer_that_is_thrown_away_is_whole():
    source = dl.DirtyBitmap(5000)
    source.fill()
    throw(source.harvest)
    assert source.harvest().count == 5000


def test_an_inexact_answer_that_is_thrown_away_stays_inexact_and_has_been_said():
    keeper = Owed(64)
    said = []

    def warn(pages):
        said.append(pages.count)

    throw(lambda: keeper.take(lambda: dl.DirtyPages.from_indices(PAGES, 64, exact=False), warn=warn))
    answer = keeper.take(lambda: dl.DirtyPages.from_indices([], 64), warn=warn)
    assert answer.indices().tolist() == PAGES
    assert not answer.exact
    assert said == [3]


def test_answers_of_several_sources_that_are_thrown_away_are_each_their_own():
    keepers = {name: Owed(64) for name in "ab"}
    wanted = {"a": [1], "b": [2, 3]}

    def give(name):
        return lambda: dl.DirtyPages.from_indices(wanted[name], 64)

    throw(take_all, [(name, keeper, give(name)) for name, keeper in keepers.items()])
    for name, keeper in keepers.items():
        assert keeper.take(lambda: dl.DirtyPages.from_indices([], 64)).indices().tolist() == wanted[name]


def test_what_the_model_writes_to_a_buffer_has_the_pages_of_an_answer_that_was_thrown_away():
    vm = dl.VM()
    vm.set_memory_region(0, base_gfn=0, npages=64)
    vm.vcpus[0].touch(PAGES)
    throw(vm.get_dirty_log, 0)
    assert vm.slot(0).peek().indices().tolist() == PAGES
    out = np.zeros(1, np.uint64)
    vm.vcpus[0].touch([7])
    pages = vm.get_dirty_log(0, out)
    assert dl.indices(out).tolist() == pages.indices().tolist() == sorted([*PAGES, 7])


def test_a_slot_of_the_same_number_does_not_get_what_the_one_before_was_owed():
    vm = dl.VM()
    vm.set_memory_region(0, base_gfn=0, npages=64)
    vm.vcpus[0].touch(PAGES)
    throw(vm.get_dirty_log, 0)
    vm.set_memory_region(0, base_gfn=0, npages=0)
    vm.set_memory_region(0, base_gfn=0, npages=32)
    assert vm.get_dirty_log(0).count == 0


def test_an_answer_keeps_neither_its_source_nor_foreign_memory():
    memory = mmap.mmap(-1, PAGE)
    source = dl.DirtyBitmap.from_buffer(memory)
    source.mark_pages(PAGES)
    pages = source.harvest()
    del source
    memory.close()
    with pytest.raises(ThrownError):
        print([pages], pages := None, fail())


@pytest.mark.parametrize(
    "use",
    [
        list,
        tuple,
        set,
        sorted,
        max,
        hash,
        repr,
        np.asarray,
        pickle.dumps,
        lambda pages: 3 in pages,
        lambda pages: pages == 3,
        lambda pages: next(iter(pages)),
        lambda pages: next((page for page in pages if page > 10_000), None),
        lambda pages: getattr(pages, "nothing", None),
        lambda pages: pages | pages,
        lambda pages: pages.runs(),
        lambda pages: pages.rows(np.zeros(1000 * PAGE, np.uint8)),
        dl.DirtyBitmap(1000).merge,
    ],
)
@pytest.mark.parametrize("count", [3, 900])
def test_exceptions_that_are_only_a_way_to_say_no_give_nothing_back(use, count):
    source = dl.DirtyBitmap(1000)
    source.mark_range(1, count)
    use(source.harvest())
    assert source.harvest().count == 0


def test_what_a_failing_call_was_handed_is_dirty_still():
    source = dl.DirtyBitmap(64)
    source.mark_pages(PAGES)
    with pytest.raises(IndexError, match="62"):
        dl.DirtyBitmap(63).merge(source.harvest())
    assert source.harvest().indices().tolist() == PAGES


def test_an_epoch_that_fails_reports_its_pages_once():
    source = dl.DirtyBitmap(64)
    log = dl.DirtyLog()
    log.attach(source)
    a, b = log.observer("a"), log.observer("b")
    source.mark_pages(PAGES)
    with pytest.raises(ThrownError), a.collect():
        fail()
    gc.collect()
    for observer in (a, b, a, b):
        with warnings.catch_warnings(), observer.collect() as epoch:
            assert epoch.pages.indices().tolist() == (PAGES if epoch.number == 1 else [])
