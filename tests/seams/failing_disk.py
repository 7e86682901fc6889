"""Every sink that writes files, beside a disk of which the n-th call fails: a program of its own, under failing.so.

Says what was lost, what is there though it was said to have failed, and what cannot be done again; nothing if all is
well.
"""

import ctypes
import errno
import os
import shutil
import sys
import tempfile
import warnings

import numpy as np

import dirtylog as dl
from dirtylog.sinks import snapshot
from dirtylog.sinks.trace import Recorder, Trace

PAGE, PAGES = 4096, 24


class Disk:
    """What fails, and when."""

    def __init__(self, library):
        self.library = ctypes.CDLL(library)
        self.library.arm.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_int]
        self.library.disarm.restype = ctypes.c_long

    def fails(self, call, first, number, error):
        """Call with the disk failing; return how many of its calls there were, and what was raised."""
        raised = None
        self.library.arm(first, number, error)
        try:
            call()
        except OSError as problem:
            raised = problem
        finally:
            calls = self.library.disarm()
        return calls, raised


def memory():
    array = dl.zeros(PAGES * PAGE, np.uint8)
    array[:] = np.arange(PAGES * PAGE) % 251
    return array


def wrong(what, path, array):
    return [] if (snapshot.restore(path) == array).all() else [f"{what} is not what was saved"]


def diff(directory, failing):
    array, said = memory(), []
    bitmap, log = dl.DirtyBitmap(PAGES), dl.DirtyLog()
    log.attach(bitmap)
    observer = log.observer("diffs")
    snapshot.save(directory + "/base", array)
    base = array.copy()
    array[3 * PAGE] += 1
    array[17 * PAGE + 5] += 1
    bitmap.mark_pages([3, 17])

    def save():
        with observer.collect() as epoch:
            if not {3, 17} <= set(epoch.pages.indices().tolist()):
                said.append("pages are lost")
            snapshot.save_diff(directory + "/diff", array, epoch.pages, parent=directory + "/base")

    calls, raised = failing(save)
    said += wrong("the base", directory + "/base", base)
    if raised:
        array[5 * PAGE] += 1
        bitmap.mark(5)
        save()
    return calls, said + wrong("the diff", directory + "/diff", array)


def replace(directory, failing):
    array, path = memory(), directory + "/base"
    snapshot.save(path, array)
    before = array.copy()
    array += 1
    calls, raised = failing(lambda: snapshot.save(path, array, replace=True))
    said = wrong("what was replaced, or should not be,", path, before if raised else array)
    snapshot.save(path, array, replace=True)
    return calls, said + wrong("the snapshot", path, array)


def chain(directory, failing):
    array, moments = memory(), []
    for number in range(4):
        array[number * PAGE] += 1
        path = f"{directory}/{number}"
        if number:
            pages = dl.DirtyPages.from_indices([number], PAGES)
            snapshot.save_diff(path, array, pages, parent=f"{directory}/{number - 1}")
        else:
            snapshot.save(path, array)
        moments.append(array.copy())
    calls, raised = failing(lambda: snapshot.prune(directory, keep_last=2))
    said = []
    if raised:
        for number, moment in enumerate(moments):
            if os.path.exists(f"{directory}/{number}"):
                said += wrong(f"snapshot {number}", f"{directory}/{number}", moment)
    snapshot.prune(directory, keep_last=2)
    return calls, said + wrong("2", f"{directory}/2", moments[2]) + wrong("3", f"{directory}/3", moments[3])


def checkpoint(directory, failing):
    arrays, said = {"w": memory(), "b": np.zeros(999)}, []

    def check(what, wanted):
        loaded = dl.Checkpoint.load(directory)
        if not all((loaded[name] == wanted[name]).all() for name in wanted):
            said.append(f"{what} is not what was saved")

    with dl.Checkpoint(directory, arrays, backend="compare", keep=2) as saves:
        for page in range(3):
            arrays["w"][page * PAGE] += 1
            saves.save()
        before = {name: array.copy() for name, array in arrays.items()}
        arrays["w"][3 * PAGE] += 1
        arrays["b"][900] += 1
        calls, raised = failing(saves.save)
        check("the checkpoint", before if raised else arrays)
        arrays["w"][4 * PAGE] += 1
        try:
            saves.save()
        except OSError:  # of merging older ones, which is told by the next call
            saves.save()
        check("the next one", arrays)
    return calls, said


def trace(directory, failing):
    path = directory + "/trace"

    def record():
        with Recorder(path, PAGES) as recorder:
            for page in range(3):
                recorder.write(page + 1.0, dl.DirtyPages.from_indices([page], PAGES))

    calls, raised = failing(record)
    if raised:
        return calls, [f"{name} is left" for name in os.listdir(directory)]
    with Trace(path) as read:
        pages = [epoch.pages.indices().tolist() for epoch in read.epochs()]
    return calls, [] if pages == [[0], [1], [2]] else [f"the trace has {pages}"]


def run(disk, root, sink, first, number, error):
    """Let some calls fail; print what is wrong, and return how many calls there were."""
    directory = tempfile.mkdtemp(dir=root)
    calls, said = globals()[sink](directory, lambda call: disk.fails(call, first, number, error))
    for each in said:
        print(f"{each}, where call {first} fails with {errno.errorcode.get(error, 'half')}")
    shutil.rmtree(directory)
    return calls


def main(library, sink):
    """Let each call fail in turn: alone, with all that follow, and by doing half."""
    warnings.simplefilter("ignore")
    disk, root = Disk(library), tempfile.mkdtemp()
    try:
        for number, error in ((1, errno.EIO), (1, 0), (1 << 40, errno.ENOSPC)):
            calls = run(disk, root, sink, 1 << 40, 0, 0)
            assert calls > 10, calls
            for first in range(1, calls + 1):
                run(disk, root, sink, first, number, error)
    finally:
        shutil.rmtree(root)


main(*sys.argv[1:])
