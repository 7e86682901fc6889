"""Threads beside the one that runs a test."""

import sys
import threading
from contextlib import contextmanager

# Whether only one thread runs Python at a time.
GIL = getattr(sys, "_is_gil_enabled", lambda: True)()


@contextmanager
def side_by_side(*functions):
    """Run each function in a thread of its own while the block runs; yield a callable: does any still run?"""
    failures = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    try:
        yield lambda: not failures and any(thread.is_alive() for thread in threads)
    finally:
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
