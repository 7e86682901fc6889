"""A program like a training run, to be killed: threads write several arrays, a thread of the checkpoint saves them.

``python training.py DIRECTORY``: prints a byte now and then. What step `s` has written can be computed from `s`.
"""

import os
import sys
import threading

import numpy as np

import dirtylog as dl

THREADS = 3
ROWS = 200


def blank():
    return {
        "w": np.zeros((ROWS, 512)),
        "b": np.zeros(1000, np.int64),
        "f": np.zeros((50, 60), np.float32, order="F"),
    }


def write(arrays, step):
    arrays["w"][step % ROWS] = step
    arrays["b"][step % 1000] = step
    arrays["f"][step % 50, step % 60] = step
    arrays["w"][-1, -1] = arrays["b"][-1] = arrays["f"][-1, -1] = step


def expected(step):
    """Return the arrays after a step: of each place, what wrote it last."""
    arrays = blank()
    for each in range(max(step - 3000, 1), step + 1):
        write(arrays, each)
    return arrays


def main(directory):
    arrays = blank()
    step = 0
    with dl.Checkpoint(directory, arrays, every=0.05, keep=3, sync=False) as checkpoint:

        def work():
            nonlocal step
            while True:
                # What belongs together is written under the lock, so that no save comes in between.
                with checkpoint.lock:
                    step += 1
                    write(arrays, step)
                    if step % 500 == 0:
                        os.write(1, b".")

        threads = [threading.Thread(target=work, daemon=True) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(sys.argv[1])
