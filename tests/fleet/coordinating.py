"""A coordinator as a process of its own, which somebody kills: takes a fleet through epochs and says what it does.

What a step writes depends on the rows alone and not on who has them, so the steps that came before a snapshot say what
it holds, in any number of shards. `test_dask.py` runs this file, and kills it and the workers at random moments.
"""

from contextlib import suppress

import numpy as np

ROWS, COLUMNS, CHUNK = 32, 512, 4


def writer():
    """Return what runs in the workers: made here, so that it travels by value."""
    rows, chunk = ROWS, CHUNK

    def write(array, first_row, step):
        # Every chunk says the step, and one row of all of them says it in full, another from step to step.
        array[-first_row % chunk :: chunk, 0] = step
        row = step * 7 % rows - first_row
        if 0 <= row < len(array):
            array[row, 1:] = step

    return write


def states(steps):
    """Yield what the array holds after each of some steps."""
    write, model = writer(), np.zeros((ROWS, COLUMNS))
    for step in steps:
        write(model, 0, step)
        yield model


def opened(client, workers_come_back, repo, timeout):
    """Open the array as the store has it, or make it; workers may die meanwhile."""
    from dirtylog.fleet.dask import ShardedArray

    for _ in range(20):
        workers_come_back()
        with suppress(OSError):
            try:
                return ShardedArray.restore(client, repo, timeout=timeout)
            except KeyError:
                # Where a worker dies after it is in the store and before it is in the workers, it is restored.
                return ShardedArray(client, (ROWS, COLUMNS), repo=repo, chunks=(CHUNK, COLUMNS), timeout=timeout)
    raise TimeoutError("the array cannot be opened")


def recover(workers_come_back, array):
    """Bring back what was lost, though workers may die in the middle of it; return the lost shards."""
    for _ in range(20):
        workers_come_back()
        with suppress(Exception):
            return array.recover()
    return array.recover()


def coordinate(address, directory, workers, first, last, tell):
    """Take a fleet through the steps from `first` to `last`."""
    import distributed
    import icechunk

    from dirtylog.sinks.store import repository

    icechunk.set_logs_filter("error")
    repo, write, timeout = repository(directory), writer(), 60

    def workers_come_back():
        with suppress(TimeoutError):
            client.wait_for_workers(workers, timeout=20)

    with distributed.Client(address) as client, opened(client, workers_come_back, repo, timeout) as array:
        for step in range(first, last + 1):
            tell.send(("begins", step))
            try:
                array.apply(write, step)
                committed = array.checkpoint(step=step)
            except Exception as error:
                tell.send(("failed", step, f"{type(error).__name__}: {error}"[:300]))
                tell.send(("recovered", step, recover(workers_come_back, array)))
            else:
                tell.send(("committed", step, committed.snapshot))


if __name__ == "coordinator":
    coordinate(*ARGUMENTS)  # noqa: F821  given by runpy
