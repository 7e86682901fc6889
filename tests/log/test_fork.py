"""A log and fork(): the child waits for no thread that it does not have, and loses nothing."""

import os
import subprocess
import sys

import pytest

CODE = """
import os, signal, threading, warnings
import dirtylog as dl

class Slow:
    npages, page_size = 100, 4096
    def __init__(self):
        self.bitmap, self.entered, self.go_on = dl.DirtyBitmap(100), threading.Event(), threading.Event()
    def harvest(self):
        pages = self.bitmap.harvest()
        if threading.current_thread() is not threading.main_thread():
            self.entered.set()
            self.go_on.wait()
        return pages

signal.alarm(60)
slow, quick = Slow(), dl.DirtyBitmap(50)
log = dl.DirtyLog()
log.attach(quick, 200)
log.attach(slow)
mine, other = log.observer("mine"), log.observer("other")
slow.bitmap.mark(7)
quick.mark(3)

def collect():
    with mine.collect():
        pass

thread = threading.Thread(target=collect)
thread.start()
slow.entered.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with other.collect() as epoch:
            print(epoch.pages.runs().tolist(), epoch.pages.exact, len(caught))
        with mine.collect() as epoch:
            print(epoch.pages.runs().tolist(), epoch.pages.exact)
        with log.observer("third").collect() as epoch:
            print(epoch.pages.count, flush=True)
    os._exit(0)
status = os.waitpid(child, 0)[1]
slow.go_on.set()
thread.join()
with other.collect() as epoch:
    print(status, epoch.pages.indices().tolist(), epoch.pages.exact)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
def test_a_fork_beside_a_collect_leaves_the_child_a_log_that_works():
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", CODE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[[0, 100], [203, 1]] False 1\n[[0, 100], [203, 1]] False\n0\n0 [7, 203] True\n"
