"""What every source of dirty pages promises, asked of each of them."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dirtylog as dl

sizes = pytest.mark.parametrize("npages", [1, 63, 64, 65, 512, 1000])


def pages(dirty):
    return set(dirty.indices().tolist())


def check(opened, reported, written):
    """Everything written is reported; nothing else, unless the source may report too much."""
    assert reported.exact
    found, expected = pages(reported), set(written)
    assert expected <= found
    if not opened.overreports:
        assert found == expected
    # I7: nothing past the last page.
    assert all(0 <= page < opened.source.npages for page in found)


@sizes
def test_it_says_its_size_and_starts_clean(open_source, npages):
    with open_source(npages) as opened:
        source = opened.source
        assert (source.npages, source.page_size) == (npages, 4096)
        for dirty in (source.peek(), source.harvest()):
            assert isinstance(dirty, dl.DirtyPages)
            assert (dirty.npages, dirty.page_size) == (npages, 4096)
            check(opened, dirty, [])


@sizes
def test_first_and_last_page_and_those_at_a_words_edge_are_reported(open_source, npages):
    written = sorted({page for page in (0, 1, 62, 63, 64, 65, 127, 128, npages - 1) if page < npages})
    with open_source(npages) as opened:
        opened.write(written)
        check(opened, opened.source.harvest(), written)


@sizes
def test_all_pages_are_reported_and_none_past_the_end(open_source, npages):
    with open_source(npages) as opened:
        opened.write(list(range(npages)))
        dirty = opened.source.harvest()
        assert dirty.count == npages
        assert len(dirty.words) == -(-npages // 64)
        assert int(dirty.words[-1]) == (1 << ((npages - 1) % 64 + 1)) - 1


def test_every_third_page_is_reported(open_source):
    with open_source(3000) as opened:
        written = list(range(0, 3000, 3))
        opened.write(written)
        check(opened, opened.source.harvest(), written)


def test_a_harvest_clears_and_a_later_write_is_reported_again(open_source):
    with open_source(200) as opened:
        for written in ([5, 70], [], [70, 199], [70]):
            opened.write(written)
            check(opened, opened.source.harvest(), written)


def test_a_page_written_many_times_is_reported_once(open_source):
    with open_source(100) as opened:
        opened.write([7, 7, 8, 7])
        opened.write([8])
        check(opened, opened.source.harvest(), [7, 8])


def test_a_peek_clears_nothing(open_source):
    with open_source(200) as opened:
        opened.write([5, 70])
        first = opened.source.peek()
        check(opened, first, [5, 70])
        opened.write([71])
        check(opened, opened.source.peek(), [5, 70, 71])
        harvested = opened.source.harvest()
        check(opened, harvested, [5, 70, 71])
        assert pages(first) <= pages(harvested)
        check(opened, opened.source.peek(), [])


def test_what_was_handed_out_never_changes(open_source):
    with open_source(200) as opened:
        opened.write([5])
        peeked, harvested = opened.source.peek(), opened.source.harvest()
        before = [dirty.to_bytes() for dirty in (peeked, harvested)]
        opened.write([6, 5])
        opened.source.peek()
        opened.source.harvest()
        assert [dirty.to_bytes() for dirty in (peeked, harvested)] == before


def test_answers_can_be_joined(open_source):
    with open_source(200) as opened:
        opened.write([5, 6])
        first = opened.source.harvest()
        opened.write([6, 199])
        second = opened.source.harvest()
        check(opened, first | second, [5, 6, 199])
        assert {6} <= pages(first & second)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.lists(st.integers(0, 129), max_size=20)),
        st.tuples(st.sampled_from(["harvest", "peek"])),
    ),
    max_size=25,
)


@settings(max_examples=15)
@given(steps)
def test_any_sequence_of_writes_harvests_and_peeks_agrees_with_a_set(open_source, steps):
    expected = set()
    with open_source(130) as opened:
        for step in steps:
            if step[0] == "write":
                opened.write(step[1])
                expected |= set(step[1])
            else:
                check(opened, getattr(opened.source, step[0])(), expected)
                if step[0] == "harvest":
                    expected = set()


def test_no_write_is_lost_while_another_thread_harvests(open_source):
    npages, rounds = 256, 20
    order = np.random.default_rng(7).permutation(npages)
    with open_source(npages) as opened:
        written = []

        def body():
            for at in range(rounds):
                batch = order[at * 12 : at * 12 + 12].tolist()
                opened.write(batch)
                written.extend(batch)

        writer = threading.Thread(target=body)
        writer.start()
        reported = []
        while writer.is_alive():
            reported.append(opened.source.harvest())
        writer.join(60)
        reported.append(opened.source.harvest())
        union = dl.DirtyPages.from_indices([], npages)
        for dirty in reported:
            union |= dirty
        check(opened, union, written)


def test_two_threads_that_harvest_share_the_pages_between_them(open_source):
    """Each page goes to at least one of them; of a source that is exact, to exactly one."""
    with open_source(256) as opened:
        for at in range(10):
            written = list(range(at, 256, 3))
            opened.write(written)
            taken = []
            start = threading.Barrier(2)

            def body(taken=taken, start=start):
                start.wait(60)
                taken.append(opened.source.harvest())

            threads = [threading.Thread(target=body) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            check(opened, taken[0] | taken[1], written)
            if not opened.overreports:
                assert not taken[0] & taken[1]


def test_the_log_serves_observers_from_it(open_source):
    with open_source(200) as opened:
        log = dl.DirtyLog()
        log.attach(opened.source, first_page=64)
        one, other = log.observer("one"), log.observer("other")
        opened.write([5])
        with one.collect() as epoch:
            assert {64 + 5} <= pages(epoch.pages)
        opened.write([6])
        with other.collect() as epoch:
            assert {64 + 5, 64 + 6} <= pages(epoch.pages)
        with one.collect() as epoch:
            assert {64 + 6} <= pages(epoch.pages)
