"""Trackers and fork(): the parent goes on, the child is refused and may track anew."""

import subprocess
import sys

import pytest

from dirtylog.sources.memory import _tracking

from .. import warm


def interpreted(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def run(code, backend, begun=warm.run):
    """In a process of its own: fork() in one that has threads is deprecated."""
    prelude = f"""
import mmap, os, signal, sys, threading, warnings
import numpy as np
import dirtylog as dl
from dirtylog.sources.memory import _tracking
warnings.simplefilter("error")
backend = {backend!r}
PAGE = mmap.PAGESIZE

def in_child(work):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            sys.stdout.flush()
            code = 0
        except BaseException as error:
            print("child:", repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0

array = dl.empty((8, PAGE), np.uint8)
array[:] = 7
"""
    done = begun(prelude + code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_parent_sees_its_writes_after_a_fork(backend):
    code = """
tracker = dl.track(array, backend)
array[1] = 1
in_child(lambda: array.__setitem__(5, 9))
array[3] = 1
print(tracker.harvest().indices().tolist())
array[3] = 2
print(tracker.harvest().indices().tolist())
tracker.close()
"""
    assert run(code, backend) == "[1, 3]\n[3]\n"


def test_the_child_is_refused_and_told_what_to_do(backend):
    code = """
tracker = dl.track(array, backend)
def child():
    for call in (tracker.harvest, tracker.peek):
        try:
            call()
        except dl.DirtyLogError as error:
            print(error)
    tracker.close()
in_child(child)
tracker.close()
"""
    refusal = (
        "this tracker belongs to the parent process: a fork's child is not tracked; "
        "close it here and track the buffer in the child itself\n"
    )
    assert run(code, backend) == 2 * refusal


def test_the_child_can_track_anew_and_the_parent_does_not_notice(backend):
    code = """
tracker = dl.track(array, backend)
def child():
    with dl.track(array, backend) as own:
        array[4] = 9
        print(own.harvest().indices().tolist())
    tracker.close()
    array[5] = 9
in_child(child)
array[2] = 1
print(tracker.harvest().indices().tolist())
tracker.close()
"""
    assert run(code, backend) == "[4]\n[2]\n"


def test_the_child_inherits_no_registry_and_no_descriptor():
    if refusal := _tracking.probe("userfaultfd"):
        pytest.skip(f"userfaultfd: {refusal}")
    code = """
before = set(os.listdir("/proc/self/fd"))
tracker = dl.track(array, backend)
def child():
    assert _tracking.open_spans(backend) == 0
    dl.track(array, backend).close()
    assert set(os.listdir("/proc/self/fd")) == before
in_child(child)
assert _tracking.open_spans(backend) == 1
tracker.close()
"""
    assert run(code, "userfaultfd") == ""


def test_after_a_fork_auto_compares_memory_that_a_child_may_share():
    code = """
shared = mmap.mmap(-1, 8 * PAGE)
def kind():
    with dl.track(shared) as tracker:
        return tracker.backend, list(tracker.refused.values())[:1]
print(kind()[0] == backend)
in_child(lambda: print(kind()[0]))
print(kind())
"""
    refusal = "a process that was forked may write this anonymous shared memory unseen"
    best = "userfaultfd" if not _tracking.probe("userfaultfd") else "mprotect"
    if _tracking.probe(best):
        pytest.skip("compare is the only back end here")
    # One that has not been forked itself, as every warm one was.
    assert run(code, best, interpreted) == f"True\ncompare\n('compare', ['{refusal}'])\n"


def test_a_child_that_forgets_the_parents_tracker_is_silent(backend):
    code = """
tracker = dl.track(array, backend)
def child():
    global tracker
    tracker = None
in_child(child)
tracker.close()
"""
    assert run(code, backend) == ""


def test_a_write_in_the_child_to_protected_memory_goes_through(backend):
    code = """
tracker = dl.track(array, backend)
def child():
    array[:] = 3
    print(int(array.max()))
in_child(child)
print(tracker.harvest().count, int(array.max()))
tracker.close()
"""
    assert run(code, backend) == "3\n0 7\n"


def test_a_fork_while_another_thread_harvests_leaves_no_lock_behind(backend):
    code = """
warnings.simplefilter("default")
tracker = dl.track(array, backend)
stop = threading.Event()
def harvest():
    while not stop.is_set():
        tracker.harvest()
thread = threading.Thread(target=harvest)
thread.start()
def child():
    signal.alarm(20)
    with dl.track(array, backend) as own:
        array[1] = 5
        assert own.harvest().indices().tolist() == [1]
for _ in range(30):
    in_child(child)
stop.set()
thread.join()
tracker.close()
"""
    assert run(code, backend) == ""


def test_memory_shared_with_a_child_is_reported_whole_after_the_fork(backend):
    code = """
shared = mmap.mmap(-1, 8 * PAGE)
tracker = dl.track(shared, backend)
shared[2 * PAGE] = 1
print(tracker.harvest().indices().tolist())
in_child(lambda: shared.__setitem__(5 * PAGE, 1))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    answer = tracker.harvest()
print(5 in answer, answer.exact, [w.category.__name__ for w in caught])
tracker.close()
shared.close()
"""
    expected = "True True []" if backend == "compare" else "True False ['IncompleteLogWarning']"
    assert run(code, backend) == f"[2]\n{expected}\n"


@pytest.mark.parametrize("way", ["tracker.close()", "del tracker"])
def test_a_child_can_let_go_of_a_tracker_that_was_comparing_at_the_fork(way):
    """The lock is held as by a harvest in a thread that the child does not have."""
    code = f"""
tracker = dl.track(array, backend)
signal.alarm(60)
held = tracker._engine._lock
held.acquire()
def child():
    global tracker
    signal.alarm(20)
    {way}
in_child(child)
held.release()
array[3] = 1
print(tracker.harvest().indices().tolist())
tracker.close()
"""
    assert run(code, "compare") == "[3]\n"
