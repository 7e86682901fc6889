"""The judge of leaks: sees each kind of them, however slow, and is not taken in by what grows once."""

import mmap
import os
import threading

import pytest

from .leaks import assert_nothing_leaks, leaks

kept = []


def leak(count, kind, every):
    for at in range(count):
        if at % every:
            continue
        if kind == "descriptors":
            kept.append(os.open("/dev/null", os.O_RDONLY))
        elif kind == "mappings":
            # Two neighbours of one kind would be one mapping.
            kept.append(mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ if len(kept) % 2 else mmap.PROT_WRITE))
        elif kind == "threads":
            kept.append(threading.Thread(target=threading.Event().wait, daemon=True))
            kept[-1].start()
        else:
            kept.append(bytearray(b"x") * 100_000)  # written: zeros may be pages that nothing has touched yet


@pytest.mark.parametrize("kind", ["descriptors", "mappings", "resident pages"])
def test_what_is_left_by_one_round_in_twenty_is_a_leak(kind):
    with pytest.raises(AssertionError, match=f"every 100 rounds leave at least .*{kind}"):
        assert_nothing_leaks(leak, kind, 20, rounds=400)


def test_a_thread_that_is_left_is_a_leak():
    with pytest.raises(AssertionError, match="threads"):
        assert_nothing_leaks(leak, "threads", 10, rounds=80)


def lose(count, size):
    kept.extend(bytes(size) for _ in range(count))


@pytest.mark.parametrize("size", [150, 400, 1000, 10_000])
def test_a_little_that_every_round_leaves_is_a_leak(size):
    """Also where the allocator has room for it, and takes no page more for hundreds of rounds."""
    with pytest.raises(AssertionError, match="every 250 rounds leave at least"):
        assert_nothing_leaks(lose, size)


def grow_once(count):
    if len(kept) < 2:
        kept.append(bytearray(8 << 20))
        kept.append(os.open("/dev/null", os.O_RDONLY))


def test_what_grows_once_is_no_leak():
    assert_nothing_leaks(grow_once, rounds=40)


def test_a_step_of_any_size_is_noise_and_a_slow_climb_is_not():
    at = {"descriptors": 3, "mappings": 9, "threads": 1}
    climb = [{**at, "resident pages": pages} for pages in (1000, 1030, 1061, 1090, 1125)]
    step = [{**at, "resident pages": pages} for pages in (1000, 1219, 2500, 2500, 9000)]
    assert leaks(climb, 1000) == {"resident pages": 29}
    assert leaks(step, 1000) == {}


def fail(count):
    raise RuntimeError("no such thing")


def test_a_round_that_fails_is_a_failure_and_says_which():
    with pytest.raises(AssertionError, match="RuntimeError: no such thing"):
        assert_nothing_leaks(fail)
