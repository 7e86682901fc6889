"""Real threads: no mark lost, none invented, and Python goes on while the core works."""

import sys
import threading

import numpy as np
import pytest

import dirtylog as dl
from dirtylog import _core

from ..side_by_side import GIL, side_by_side

NPAGES = 40_000  # more than one group of lines: the summary has several words
WRITERS = 3
ROUNDS = 120


def own():
    return dl.DirtyBitmap(NPAGES)


def foreign():
    return dl.DirtyBitmap.from_buffer(np.zeros(-(-NPAGES // 64), np.uint64), NPAGES)


def mark_batch(bitmap, pages):
    bitmap.mark_pages(pages)


def mark_one_by_one(bitmap, pages):
    for page in pages[:50].tolist():
        bitmap.mark(page)
    bitmap.mark_pages(pages[50:])


def merge(bitmap, pages):
    bitmap.merge(dl.DirtyPages.from_indices(pages, NPAGES))


def harvest_whole(bitmap):
    yield bitmap.harvest()


def harvest_in_parts(bitmap):
    for first, end in ((0, 100), (100, 33_001), (33_001, NPAGES)):
        yield bitmap.harvest(first, end - first)


def harvest_into(bitmap):
    yield bitmap.harvest(out=np.full(-(-NPAGES // 64), 7, np.uint64))


def peek_then_clear(bitmap):
    """KVM's manual protection: report, clear what was reported, then use it."""
    seen = bitmap.peek()
    bitmap.clear(seen)
    yield seen


def run_threads(*targets):
    """Run targets at once; what one raises is raised here."""
    with side_by_side(*targets):
        pass


@pytest.mark.parametrize("make", [own, foreign])
@pytest.mark.parametrize("mark", [mark_batch, mark_one_by_one, merge])
@pytest.mark.parametrize("harvest", [harvest_whole, harvest_in_parts, harvest_into, peek_then_clear])
def test_three_writers_and_one_harvester_lose_no_mark_and_invent_none(make, mark, harvest):
    bitmap = make()
    contents = np.zeros(NPAGES, np.int64)
    replica = np.zeros(NPAGES, np.int64)
    marked = np.zeros(NPAGES, np.int64)
    harvested = np.zeros(NPAGES, np.int64)
    writing = [True] * WRITERS
    start = threading.Barrier(WRITERS + 1)

    def write(writer):
        # Writers share words, never pages; every fourth page is nobody's.
        random = np.random.default_rng(writer)
        mine = np.arange(writer, NPAGES, WRITERS + 1)
        start.wait()
        for generation in range(1, ROUNDS + 1):
            pages = random.choice(mine, size=500, replace=False)
            contents[pages] = generation
            marked[pages] += 1
            mark(bitmap, pages)
        writing[writer] = False

    def take():
        for dirty in harvest(bitmap):
            pages = dirty.indices()
            replica[pages] = contents[pages]
            harvested[pages] += 1

    def harvest_while_they_write():
        start.wait()
        while any(writing):
            take()

    run_threads(harvest_while_they_write, *(lambda writer=writer: write(writer) for writer in range(WRITERS)))
    take()
    assert np.array_equal(replica, contents), "a mark was lost: the replica has old contents"
    assert (harvested <= marked).all(), "a mark was invented: a page was harvested oftener than marked"
    assert ((harvested > 0) == (marked > 0)).all()
    assert not bitmap.harvest()


def neighbours_in_one_line(npages):
    """Every page; those next to each other in the batch lie in different words of one cache line."""
    return np.arange(npages).reshape(-1, 8, 64).transpose(0, 2, 1).ravel()


def one_page_a_line(npages):
    """A mark that is missed has no later one in its line that would bring it to light."""
    return np.arange(0, npages, 512)


@pytest.mark.parametrize("summary", [True, False], ids=["own", "foreign"])
@pytest.mark.parametrize(
    ("npages", "order", "rounds"), [(WRITERS * 2**17, neighbours_in_one_line, 60), (2**24, one_page_a_line, 200)]
)
def test_a_page_marked_once_is_harvested_once_however_near_the_harvester_is(npages, order, rounds, summary):
    # The harvester catches up with the writers again and again and takes the very words that they
    # are marking. An exchange that is not atomic, or a summary set before its word, loses marks here.
    bitmap = dl.DirtyBitmap(npages) if summary else dl.DirtyBitmap.from_buffer(np.zeros(npages // 64, np.uint64))
    pages = order(npages)
    for _ in range(rounds):
        writing = [True] * WRITERS
        taken = []

        def write(writer, writing=writing):
            bitmap.mark_pages(pages[writer::WRITERS])
            writing[writer] = False

        def harvest(writing=writing, taken=taken):
            while any(writing):
                taken.append(bitmap.harvest())

        run_threads(harvest, *(lambda writer=writer: write(writer) for writer in range(WRITERS)))
        taken.append(bitmap.harvest())
        everything = dl.DirtyBitmap(npages)
        for dirty in taken:
            everything.merge(dirty)
        assert everything.count() == len(pages), "a mark was lost"
        assert sum(dirty.count for dirty in taken) == len(pages), "a mark was harvested twice"


def test_marking_ranges_beside_a_harvester_loses_no_mark():
    bitmap = own()
    generations = 300
    counts = np.zeros(NPAGES, np.int64)
    last = np.zeros((2, NPAGES), np.int64)
    writing = [True, True]

    def write(writer):
        # Both mark every page; a page's value tells which generation was seen.
        for generation in range(1, generations + 1):
            contents[writer, :] = generation
            bitmap.mark_range(0, NPAGES)
        writing[writer] = False

    contents = np.zeros((2, NPAGES), np.int64)

    def take():
        pages = bitmap.harvest().indices()
        counts[pages] += 1
        last[:, pages] = contents[:, pages]

    def harvest_while_they_write():
        while any(writing):
            take()

    run_threads(harvest_while_they_write, lambda: write(0), lambda: write(1))
    take()
    assert (last == generations).all()
    assert (counts <= 2 * generations).all()


def test_two_harvesters_share_the_marks_and_take_each_once():
    bitmap = own()
    rounds = 300
    taken = [np.zeros(NPAGES, np.int64) for _ in range(2)]
    together = threading.Barrier(3)

    def mark():
        for number in range(rounds):
            bitmap.mark_range(number % 100, NPAGES - 100)
            together.wait()
            together.wait()

    def harvest(counts):
        for _ in range(rounds):
            together.wait()
            counts[bitmap.harvest().indices()] += 1
            together.wait()

    run_threads(mark, lambda: harvest(taken[0]), lambda: harvest(taken[1]))
    expected = np.zeros(NPAGES, np.int64)
    for number in range(rounds):
        expected[number % 100 : number % 100 + NPAGES - 100] += 1
    assert np.array_equal(taken[0] + taken[1], expected)


@pytest.mark.parametrize("words", [range(8), (0, 1, 2, 5, 7)], ids=["all over", "in part"])
@pytest.mark.parametrize("summary", [True, False], ids=["own", "foreign"])
def test_a_mark_in_a_line_that_is_dirty_already_is_harvested_once(summary, words):
    # The harvester marks `words` of each line before it takes it, so that it takes words two at a time, in the
    # very moment in which a writer that jumps about changes one of them.
    npages = 2**17
    bitmap = dl.DirtyBitmap(npages) if summary else dl.DirtyBitmap.from_buffer(np.zeros(npages // 64, np.uint64))
    first = np.arange(0, npages, 64)
    background = dl.DirtyPages.from_indices(first[np.isin(first // 64 % 8, words)], npages)
    pages = np.setdiff1d(np.arange(npages), background.indices())
    np.random.default_rng(1).shuffle(pages)
    for _ in range(40):
        writing = [True]
        taken = np.zeros(npages, np.int64)

        def write(writing=writing):
            bitmap.mark_pages(pages)
            writing[0] = False

        def harvest(writing=writing, taken=taken):
            while writing[0]:
                bitmap.merge(background)
                taken[bitmap.harvest().indices()] += 1

        run_threads(harvest, write)
        taken[bitmap.harvest().indices()] += 1
        assert (taken[pages] == 1).all()


def test_a_harvester_that_comes_second_leaves_no_empty_entry():
    # Over foreign memory nothing but the words themselves tells two harvesters apart: the one that has
    # less to take catches up, and then finds words empty that it has just seen dirty.
    npages = 2**26
    bitmap = dl.DirtyBitmap.from_buffer(np.zeros(npages // 64, np.uint64))
    dirty = dl.DirtyPages.from_indices(np.arange(0, npages, 8192), npages)
    found = [[], []]

    shared = []  # rounds in which both found some; one that either had to itself says nothing

    def next_round():
        shared.extend((one, other) for one, other in zip(found[0][-1:], found[1][-1:], strict=True) if one and other)
        bitmap.merge(dirty)

    together = threading.Barrier(2, action=next_round)

    def harvest(mine):
        for _ in range(2000):
            together.wait(timeout=60)  # one that raises breaks it for the other
            if len(shared) >= 50:
                return
            mine.append(bitmap.harvest())

    run_threads(lambda: harvest(found[0]), lambda: harvest(found[1]))
    assert shared  # or the two never met
    for one, other in zip(*found, strict=True):
        assert one | other == dirty
        assert not one & other
        for pages in (one, other):
            assert bool(pages) == (pages.count > 0)
            assert hash(pages) == hash(dl.DirtyPages.from_indices(pages.indices(), npages))
            assert pages == dl.DirtyPages.from_indices(pages.indices(), npages)


def test_threads_that_ask_for_the_words_of_a_sparse_result_get_the_same_ones():
    npages = 2**24
    for _ in range(100):
        pages = dl.DirtyPages.from_indices(np.arange(0, npages, 4096), npages)
        together = threading.Barrier(2)
        got = []

        def ask(pages=pages, together=together, got=got):
            together.wait(timeout=60)
            got.append(pages.words)

        run_threads(ask, ask)
        assert np.shares_memory(*got)
        assert pages.words.any()


def test_a_mark_made_before_a_harvest_is_in_it_while_others_mark_lower_pages():
    npages = 64 * 32768
    bitmap = dl.DirtyBitmap(npages)
    mine = npages - 1
    lower = np.arange(0, npages - 32768, 32768)
    started, finished = threading.Event(), threading.Event()

    def mark_lower_pages():
        while not finished.is_set():
            bitmap.mark_pages(lower)
            started.set()

    def mark_and_harvest():
        started.wait()
        try:
            for _ in range(20_000):
                bitmap.mark(mine)
                assert mine in bitmap.harvest()
        finally:
            finished.set()

    run_threads(mark_lower_pages, mark_and_harvest)


BIG = 1 << 24
EVERY_THIRD = np.arange(0, BIG, 3)


def big_words():
    return np.full(BIG // 64, 0x9249249249249249, np.uint64)


def bulk_operations():
    """Each operation of the core that takes long enough to matter, ready to call."""
    bitmap = dl.DirtyBitmap(BIG)
    pages = dl.DirtyPages.from_words(big_words(), BIG)
    other = dl.DirtyPages.from_words(~big_words(), BIG)
    memory = np.zeros(1 << 24, np.uint8)
    copy = memory.copy()
    return {
        "mark_pages": lambda: bitmap.mark_pages(EVERY_THIRD),
        "merge": lambda: bitmap.merge(pages),
        "count": bitmap.count,
        "peek": bitmap.peek,
        "clear": lambda: bitmap.clear(other),
        "harvest": bitmap.harvest,
        "fill": bitmap.fill,
        "harvest_into": lambda out=np.zeros(BIG // 64, np.uint64): bitmap.harvest(out=out),  # noqa: B008
        "mark_range": lambda: bitmap.mark_range(1, BIG - 2),
        "clear_range": lambda: bitmap.clear_range(1, BIG - 2),
        "indices": pages.indices,
        "runs": pages.runs,
        "or": lambda: pages | other,
        "and": lambda: pages & other,
        "from_indices": lambda: dl.DirtyPages.from_indices(EVERY_THIRD, BIG),
        "hash": lambda: hash(pages),
        "words_indices": lambda words=big_words(): dl.indices(words),  # noqa: B008
        "words_runs": lambda words=big_words(): dl.runs(words),  # noqa: B008
        "words_popcount": lambda words=big_words(): dl.popcount(words),  # noqa: B008
        "harvest_words": lambda: dl.harvest_words(big_words()),
        "compare_pages": lambda: _core.compare_pages(memory, copy, 4096),
        "zero_pages": lambda: _core.zero_pages(memory, 4096),
    }


BULK_OPERATIONS = [
    "mark_pages",
    "merge",
    "count",
    "peek",
    "clear",
    "harvest",
    "fill",
    "harvest_into",
    "mark_range",
    "clear_range",
    "indices",
    "runs",
    "or",
    "and",
    "from_indices",
    "hash",
    "words_indices",
    "words_runs",
    "words_popcount",
    "harvest_words",
    "compare_pages",
    "zero_pages",
]


# These find nothing to do the second time, and are over before another thread can run.
CLEARING = ("clear", "harvest", "harvest_into", "clear_range")


@pytest.fixture(scope="module")
def operations():
    operations = bulk_operations()
    assert sorted(operations) == sorted(BULK_OPERATIONS)
    return operations


@pytest.fixture
def no_forced_switches():
    """Let threads change only where one gives up the GIL of its own accord."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


@pytest.mark.skipif(not GIL, reason="no GIL to give up: when another thread runs is the scheduler's business")
@pytest.mark.parametrize("name", BULK_OPERATIONS)
def test_another_thread_runs_python_during_bulk_work(operations, no_forced_switches, name):
    operation = operations[name]
    state = "before"
    seen = []
    wake = threading.Semaphore(0)
    woken = threading.Semaphore(0)
    # On a busy machine the other thread may find no CPU while the operation lasts.
    tries = 5000

    def other_thread():
        for _ in range(tries):
            wake.acquire()
            seen.append(state)
            woken.release()
            if seen[-1] == "during":
                return

    other = threading.Thread(target=other_thread)
    other.start()
    for _ in range(tries):
        if name in CLEARING:
            operations["fill"]()
        state = "during"
        wake.release()  # makes it runnable; it needs the GIL, which this thread keeps until the operation lets go
        operation()
        state = "after"
        woken.acquire()
        if seen[-1] == "during":
            break
    other.join()
    assert seen[-1] == "during", f"{name}: in {tries} calls no other thread got to run"
