"""One process beside others in a directory of snapshots: a writer, a reader, or somebody who tidies up.

``python neighbours.py ROLE DIRECTORY SEED HOW_MANY``; it begins when it is given a line, so that all begin at once.
Page `p` of moment `m` holds the last number up to `m` that is `p` modulo the pages, so what is read tells by itself
whether it is of one moment. Prints how often it did its work.
"""

import os
import sys

import numpy as np

from dirtylog import DirtyPages
from dirtylog.sinks import snapshot
from dirtylog.sinks.snapshot import SnapshotError

NPAGES = 16


def memory_of(moment):
    pages = np.arange(NPAGES)
    numbers = moment - (moment - pages) % NPAGES
    memory = np.zeros((NPAGES, 512), np.int64)
    memory[:] = np.maximum(numbers, -1)[:, np.newaxis]
    return memory


def names(directory):
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))


def writer(directory, seed, count):
    """Write chains, replace a file of its own again and again, and begin anew where a prune was faster."""
    parent, done, refused = None, 0, 0
    for number in range(count):
        moment = number + 100
        name = os.path.join(directory, f"w{seed}-{number:06d}")
        memory = memory_of(moment)
        try:
            if parent is None or number % 50 == 0:
                snapshot.save(name, memory, sync=False)
            else:
                pages = DirtyPages.from_indices([moment % NPAGES], NPAGES)
                snapshot.save_diff(name, memory, pages, parent=parent, sync=False)
            parent = name
            if number % 3 == 0:
                snapshot.save(os.path.join(directory, f"r{seed}"), memory, replace=True, sync=False)
            done += 1
        except SnapshotError as error:
            refused += 1
            parent = None
            # It may be told that a file is about to go, or has gone; nothing else.
            legal = ("about to be removed or replaced", "no such snapshot", "was replaced or removed")
            if not any(text in str(error) for text in legal):
                raise
    return done


def reader(directory, seed, count):
    """Read whatever is there: each is of one moment, or it has just been removed."""
    rng = np.random.default_rng(seed)
    done = 0
    while done < count:
        there = names(directory)
        if not there:
            continue
        path = os.path.join(directory, there[rng.integers(len(there))])
        try:
            memory = snapshot.restore(path)
        except SnapshotError as error:
            if f"{path}: there is no such snapshot" == str(error) and not os.path.exists(path):
                continue
            raise
        moment = int(memory.max())
        assert (memory == memory_of(moment)).all(), f"{path} is not of one moment"
        done += 1
    return done


def tidier(directory, seed, count):
    """Prune, merge, flatten and rebase whatever is there."""
    rng = np.random.default_rng(seed)
    done = 0
    for _ in range(count):
        there = [os.path.join(directory, name) for name in names(directory)]
        if len(there) < 2:
            continue
        one, other = (there[i] for i in np.sort(rng.choice(len(there), 2, replace=False)))
        parents = {entry.path: entry.parent for entry in snapshot.catalog(directory) if entry.parent is not None}
        action = rng.integers(4)
        try:
            if action == 0:
                snapshot.prune(directory, keep_last=int(rng.integers(4, 12)), sync=False)
            elif action == 1:
                snapshot.merge(one, other, sync=False, patience=1)
            elif action == 2:
                snapshot.flatten(other, sync=False)
            elif action == 3 and parents:
                # Onto its parent: what would lie between the two could not be restored any more, which is no damage.
                other = sorted(parents)[rng.integers(len(parents))]
                snapshot.rebase(parents[other], other, sync=False, patience=1)
            else:
                continue
            done += 1
        except SnapshotError as error:
            # Of damage it must not be told.
            if "digest" in str(error) or "cannot be used" in str(error):
                raise
        except FileNotFoundError:
            continue
    return done


if __name__ == "__main__":
    role, where, number, how_many = sys.argv[1:]
    work = {"writer": writer, "reader": reader, "tidier": tidier}[role]
    print("ready", flush=True)
    sys.stdin.readline()
    print(work(where, int(number), int(how_many)))
