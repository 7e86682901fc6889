"""Threads that write into random pages, for the commands that show how writes are followed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Write", "Writers"]

Write = Callable[[int, NDArray[np.int64]], None]  # (writer, pages): write into each of the pages


class Writers:
    """Threads that write into random pages, most of them into a hot tenth of the memory, until told to stop."""

    def __init__(self, write: Write, writers: int, pages: int, batch: int, pause: float) -> None:
        self._write = write
        self._pages = pages
        self._batch = batch
        self._pause = pause
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(writers)]

    def __enter__(self) -> Writers:
        """Start."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop, whatever happened."""
        self.stop()

    def stop(self) -> None:
        """Stop and wait; a failure of a writer is raised here."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._failures:
            raise self._failures.pop()

    def _run(self, writer: int) -> None:
        random = np.random.default_rng(writer)
        hot = max(self._pages // 10, 1)
        try:
            writing = True
            while writing:
                anywhere = random.integers(self._pages, size=max(self._batch // 10, 1))
                somewhere_hot = random.integers(hot, size=self._batch)
                self._write(writer, np.concatenate((somewhere_hot, anywhere)))
                writing = not self._stop.wait(self._pause)
        except BaseException as error:
            self._failures.append(error)
