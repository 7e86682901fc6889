"""Another process that marks a shared log: what it is told on standard input, or one region for ever."""

import os
import sys

import numpy as np

import dirtylog as dl


def mark(log, first, count, way):
    if way == "range":
        log.mark_range(first, count)
    elif way == "pages":
        log.mark_pages(np.arange(first, first + count))
    else:
        for page in range(first, first + count):
            log.mark(page)


def main():
    descriptor, npages = int(sys.argv[1]), int(sys.argv[2])
    with dl.SharedLog.open(descriptor, npages) as log:
        if len(sys.argv) > 3:  # for ever, until it is killed
            first, count = int(sys.argv[3]), int(sys.argv[4])
            print("ready", flush=True)
            while True:
                log.mark_range(first, count)
        # In each line: whether a forked child shall do it; then first, count and way of each piece.
        for line in sys.stdin:
            forked, *words = line.split()
            child = os.fork() if forked == "fork" else -1
            if child <= 0:
                for first, count, way in zip(words[::3], words[1::3], words[2::3], strict=True):
                    mark(log, int(first), int(count), way)
            if child == 0:
                os._exit(0)
            if child > 0 and os.waitpid(child, 0)[1]:
                raise RuntimeError("the forked writer failed")
            print("done", flush=True)


main()
