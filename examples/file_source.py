"""A source of your own: the blocks of a file that changed, found by their digests, and how to prove that it is one."""

import hashlib
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import dirtylog as dl


class FileSource:
    """Blocks of a file that changed since the last harvest. All that a source has to have is below."""

    def __init__(self, path: str | Path, page_size: int = 4096) -> None:
        self.path = Path(path)
        self.page_size = page_size
        self.npages = -(-self.path.stat().st_size // page_size)
        self._lock = threading.Lock()  # two harvests at once share the pages between them
        self._digests = self._now()

    def _now(self) -> list[bytes]:
        data = self.path.read_bytes()
        blocks = (data[first : first + self.page_size] for first in range(0, len(data), self.page_size))
        # Not a checksum of 32 bits: two contents with the same one would be a write that nobody reports.
        return [hashlib.blake2b(block, digest_size=16).digest() for block in blocks]

    def _changed(self, now: list[bytes]) -> dl.DirtyPages:
        if len(now) != self.npages:
            raise dl.DirtyLogError(f"{self.path} has {len(now)} blocks and had {self.npages}; make a new source of it")
        changed = [page for page, digest in enumerate(now) if digest != self._digests[page]]
        return dl.DirtyPages.from_indices(changed, self.npages, self.page_size)

    def peek(self) -> dl.DirtyPages:
        """Look at what the next harvest would report."""
        with self._lock:
            return self._changed(self._now())

    def harvest(self) -> dl.DirtyPages:
        """Report what changed, and start over."""
        with self._lock:
            now = self._now()
            pages = self._changed(now)  # what can fail comes before anything is forgotten
            self._digests = now
            return pages


@contextmanager
def opened(npages: int) -> Iterator[SimpleNamespace]:
    """Open it for the conformance suite: python -m pytest tests/conformance --source examples.file_source:opened."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "disk.img"
        path.write_bytes(bytes(npages * 4096))
        value = iter(range(1, 1 << 32))

        def write(pages: Sequence[int]) -> None:
            with path.open("r+b", buffering=0) as file:
                for page in pages:
                    file.seek(int(page) * 4096)
                    file.write(next(value).to_bytes(4, "little"))

        yield SimpleNamespace(source=FileSource(path), write=write, overreports=False)


def main() -> None:
    """Back a file up through a log, copying only the blocks that changed."""
    with opened(1000) as disk:
        log = dl.DirtyLog()
        log.attach(disk.source)
        backup = log.observer("backup")
        copy = bytearray(disk.source.path.read_bytes())
        disk.write([7, 8, 9, 500])
        with backup.collect() as epoch:
            data = disk.source.path.read_bytes()
            for first, nbytes in epoch.pages.runs() * epoch.pages.page_size:
                copy[first : first + nbytes] = data[first : first + nbytes]
            print(f"copied {epoch.pages.count} of {epoch.pages.npages} blocks")
        assert copy == disk.source.path.read_bytes()


if __name__ == "__main__":
    main()
