"""Opens the memory of a snapshot without reading it, and puts back what was written to it."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dirtylog._bits.copying import copy_extents
from dirtylog._bits.pages import DirtyPages
from dirtylog._bits.vouched import forget_range, vouch_for_range
from dirtylog.sinks.snapshot import footer as footers
from dirtylog.sinks.snapshot import reader
from dirtylog.sinks.snapshot._mapping import Memory, holes_take_room
from dirtylog.sinks.snapshot.chain import ChainMovedError, Info, Layer, StrPath, checked_path, directories_of, settled
from dirtylog.sinks.snapshot.footer import SnapshotError
from dirtylog.sinks.snapshot.index import MAX_ROWS, Index, index
from dirtylog.sinks.snapshot.parts import Written, extents_of, put_back
from dirtylog.sinks.snapshot.space import NAMELESS, arrays_of

__all__ = ["Mapped", "open"]

# Runs of at least so many pages are given back to the system, shorter ones are copied from the page cache: the system
# call costs as much as copying a few pages, and the next write to a page that was given back copies it once more.
GIVEN_BACK = 64
# A shorter run of a diff is copied when it is laid: a mapping costs as much as copying so many pages, or more.
MAPPED_FROM = 4
_EMPTY = np.empty((0, 2), np.int64)
# Pieces of files: offset in the memory, length, offset in the file.
_NO_PIECES = np.empty((0, 3), np.int64)


def _spare_mappings() -> int:
    """How many mappings this process may still make."""
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
        with Path("/proc/self/maps").open("rb", buffering=1 << 20) as maps:
            used = maps.read().count(b"\n")
    except OSError:
        return 16384
    return max(0, limit - used)


def _plan(
    files: list[npt.NDArray[np.int64]], end: int, filled: int, least: int
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Divide pieces of each file into whole pages of the system that are mapped, from `least` bytes on, and the rest.

    What lies in a file at another place within a page of the system than in the memory cannot be mapped. The last page
    is filled with zeros in each file, as to `filled` in the memory, so it may be mapped whole. All files at once: most
    have a few pieces.
    """
    pieces = np.concatenate([_NO_PIECES, *files])
    owner = np.repeat(np.arange(len(files)), [len(each) for each in files])
    begin, stop = pieces[:, 0], pieces[:, 0] + pieces[:, 1]
    size, shift = mmap.PAGESIZE, pieces[:, 2] - begin
    low = -(-begin // size) * size
    high = np.where((stop == end) & (filled % size == 0), filled, stop) // size * size
    inside = (pieces[:, 1] >= least) & (low < high) & (shift % size == 0)
    begin, stop, low, high, shift = (each[inside] for each in (begin, stop, low, high, shift))
    whole = np.stack([low, high - low, low + shift], axis=1)
    parts = np.concatenate([
        pieces[~inside],
        np.stack([begin, low - begin, begin + shift], axis=1),
        np.stack([high, stop - high, high + shift], axis=1),
    ])  # fmt: skip
    copied_by = np.concatenate([owner[~inside], owner[inside], owner[inside]])
    order = np.argsort(copied_by, kind="stable")
    order = order[parts[order, 1] > 0]
    mapped = np.searchsorted(owner[inside], np.arange(len(files) + 1)).tolist()
    copied = np.searchsorted(copied_by[order], np.arange(len(files) + 1)).tolist()
    parts = parts[order]
    return [(whole[mapped[i] : mapped[i + 1]], parts[copied[i] : copied[i + 1]]) for i in range(len(files))]


def _least_mapped(files: list[npt.NDArray[np.int64]]) -> int:
    """Return how long a piece must be to be mapped, in bytes: as few as the process may have are the longest."""
    lengths = np.concatenate([np.empty(0, np.int64), *(pieces[:, 1] for pieces in files)])
    # A run in the middle of another mapping makes two more. Half of what may be made is left to others.
    budget = _spare_mappings() // 4
    least = MAPPED_FROM * mmap.PAGESIZE
    if np.count_nonzero(lengths >= least) > budget:
        # The longest of them, and none that is as long as one that is left out.
        least = int(np.partition(lengths, -budget - 1)[-budget - 1]) + 1
    return least


class _Layout:
    """The chain's files over one reserved range."""

    def __init__(self, found: Index) -> None:
        self.memory = Memory(found.footer.nbytes, mmap.PAGESIZE)
        # Ascending: what is no mapping of a file, and so cannot be given back.
        self.copied: npt.NDArray[np.int64] = _EMPTY
        self._base(found)
        if found.rows is None:
            self._file_by_file(found)
            return
        nbytes = found.footer.nbytes
        layers = [each for each in found.pieces(np.array([[0, nbytes]])) if each[0]]
        least = _least_mapped([pieces for _, pieces in layers])
        # Of the base too, where the system's pages are larger than a file's blocks.
        copied = [self.copied]
        plans = _plan([pieces for _, pieces in layers], nbytes, footers.footer_offset(nbytes), least)
        for (number, _), (whole, parts) in zip(layers, plans, strict=True):
            path, digest, offset = found.files[number]
            if not self.memory.lay(path, bytes.fromhex(digest), offset, whole, parts):
                raise ChainMovedError(path)
            copied.append(parts[:, :2])
        self.copied = np.concatenate(copied)
        self.copied = self.copied[np.argsort(self.copied[:, 0], kind="stable")]

    def _base(self, found: Index) -> None:
        path, digest, offset = found.files[0]
        nbytes = found.footer.nbytes
        pieces, least = np.array([[0, nbytes, 0]]), 0
        if holes_take_room(path):
            # What the file does not hold is zero here without it.
            with Layer(path, digest) as layer:
                if layer.footer.rows > MAX_ROWS:
                    self._copy(layer, path, digest, offset)
                    self.copied = np.array([[0, nbytes]])
                    return
                pieces = np.concatenate([_NO_PIECES, *layer.pieces()])
            least = _least_mapped([pieces])
        ((whole, parts),) = _plan([pieces], nbytes, offset, least)
        if not self.memory.lay(path, bytes.fromhex(digest), offset, whole, parts):
            raise ChainMovedError(path)
        self.copied = parts[:, :2]

    def _file_by_file(self, found: Index) -> None:
        """Copy each file over the one before it: for more runs than are kept in order."""
        for path, digest, offset in found.files[1:]:
            with Layer(path, digest) as layer:
                self._copy(layer, path, digest, offset)
        self.copied = np.array([[0, found.footer.nbytes]])

    def _copy(self, layer: Layer, path: str, digest: str, offset: int) -> None:
        """Copy what a file holds, a block of its runs at a time."""
        for pieces in layer.pieces():
            if not self.memory.lay(path, bytes.fromhex(digest), offset, _NO_PIECES, pieces):
                raise ChainMovedError(path)


class Mapped:
    """The memory of a snapshot, mapped: nothing is read before it is used, and nothing that is written is shared.

    Made by :func:`open`. A context manager.

    Attributes
    ----------
    path : str
        The snapshot.
    info : Info
        What it is.
    state : object
        What was saved beside the memory.
    nbytes, page_size, npages : int
        Size of the memory in bytes, of a page in bytes, and of the memory in pages.
    names : tuple of str
        Names of the arrays; empty where the memory was saved without a name.

    Notes
    -----
    The files are looked through when it is opened, and laid over each other at the first use of the memory:
    :attr:`array`, :attr:`regions`, ``mapped["name"]``. The base is mapped, each run of pages of a diff is mapped over
    it; where the system allows no more mappings (``vm.max_map_count``) the shortest runs are copied. From then on
    the files may be removed or replaced: what is mapped stays. No descriptor is kept. In a tmpfs, where reading a hole
    takes room that may not be left, holes are not mapped: they are zeros of this process.

    All processes that open a snapshot share its pages in the page cache. A page that is written is copied first: files
    never change. The memory lives for as long as an array over it does, also after :meth:`close`; the child of a
    fork has its own. A snapshot is never written in place, so :func:`dirtylog.track` write-protects the memory like
    memory of this process alone.

    A file that is *cut* while it is mapped ends the process at the next access (SIGBUS), as with any mapping. Sizes
    and digests of the footers are checked when files are opened; the data is checked by :meth:`verify`.

    Any thread may use it. Let nobody write during :meth:`reset`.
    """

    def __init__(self, path: str, search: Sequence[str]) -> None:
        self._search = search
        self._index: Index = settled(lambda: index(path, search))
        self.path: str = path
        self.info: Info = self._index.info
        self.state: Any = self.info.state
        self.nbytes: int = self.info.nbytes
        self.page_size: int = self.info.page_size
        self.npages: int = self.info.npages
        self.names: tuple[str, ...] = self.info.names
        self.closed: bool = False
        self._lock = threading.Lock()
        self._layout: _Layout | None = None
        self._pristine: _Layout | None = None
        self._array: npt.NDArray[np.uint8] | None = None
        self._arrays: dict[str, Any] = {}
        self._verification: threading.Thread | None = None
        self._verified: Info | Exception | None = None

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _laid(self) -> _Layout:
        """Lay the files over each other; again from the start if writers replace some of them meanwhile."""

        def work() -> _Layout:
            try:
                return _Layout(self._index)
            except ChainMovedError:
                fresh = index(self.path, self._search)
                if fresh.identity != self._index.identity:
                    raise SnapshotError(
                        f"{self.path}: it was replaced by another snapshot since it was opened"
                    ) from None
                self._index = fresh
                raise

        layout: _Layout = settled(work)
        return layout

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"the snapshot {self.path!r} is closed; open it again")

    def _use(self) -> tuple[npt.NDArray[np.uint8], dict[str, Any], _Layout]:
        """Return the memory as bytes, by names, and how it is laid: all of it stays though another thread closes."""
        with self._lock:
            self._check_open()
            if self._array is None:
                self._layout = self._laid()
                memory = self._layout.memory
                # A committed snapshot is never written in place, so nobody else can change what a page shows.
                vouch_for_range(memory.address, memory.mapped)
                weakref.finalize(memory, forget_range, memory.address).atexit = False
                array = np.frombuffer(memoryview(memory), np.uint8)
                self._arrays = arrays_of(self._index.footer.regions, array, self.path)
                self._array = array
            assert self._layout is not None
            return self._array, self._arrays, self._layout

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """All of the memory, as bytes: writable, copied on write."""
        return self._use()[0]

    @property
    def regions(self) -> dict[str, Any]:
        """The arrays by name, in the order in which they were saved, each with its dtype, shape and order."""
        _, arrays, _ = self._use()
        return {name: arrays[name] for name in self.names}

    def restored(self) -> Any:
        """Return the memory as :func:`restore` does: the array as it was saved, or the arrays by their names."""
        return self.regions if self._index.footer.named else self._use()[1][NAMELESS]

    def __getitem__(self, name: str) -> Any:
        """Return the array of a name."""
        _, arrays, _ = self._use()
        if name not in self.names:
            raise KeyError(f"{self.path} has no array {name!r}; it has {list(self.names)}")
        return arrays[name]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return :attr:`array`, for `numpy.asarray` and for what takes memory."""
        if copy or (dtype is not None and np.dtype(dtype) != np.uint8):
            if copy is False:
                raise ValueError("the memory is bytes; another dtype would be a copy")
            return self.array.astype(dtype or np.uint8)
        return self.array

    # ---- putting back -----------------------------------------------------------------------------------------------

    def reset(self, dirty: DirtyPages | Written | None = None) -> DirtyPages:
        """Put back what the snapshot has, in the pages that were written and in no others.

        Parameters
        ----------
        dirty : DirtyPages, tracker, or None
            Pages of the whole memory; or what tracks it: a :class:`~dirtylog.sources.memory.Tracker` of :attr:`array`,
            which starts clean again. None: all of it.

        Returns
        -------
        DirtyPages
            The pages that were put back.

        Raises
        ------
        ValueError
            The pages are of another memory; it is closed.
        SnapshotError
            The files are not there any more, and the first call to this needed them.

        Notes
        -----
        O(dirty pages), without the GIL: short runs are copied from the page cache, runs of 64 pages and more are given
        back to the system. The first call maps the files a second time, to copy from.

        With a tracker it is one peek and one harvest: pages are put back while they are still writable, so nothing
        faults, and what the harvest then reports has been put back. Pages of the system, and of the snapshot: a tracker
        of memory with other pages is converted.

        Examples
        --------
        >>> import tempfile, numpy as np, dirtylog as dl
        >>> from dirtylog.sinks import snapshot
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     about = snapshot.save(directory + "/start", np.ones(1 << 20, np.uint8))
        ...     with snapshot.open(directory + "/start") as mapped, dl.track(mapped.array) as tracker:
        ...         for attempt in range(3):
        ...             mapped.array[5000] = 2  # what you fuzz runs here
        ...             put_back = mapped.reset(tracker)
        ...         put_back.indices().tolist(), int(mapped.array.max())
        ([1], 1)
        """
        array, _, layout = self._use()
        if dirty is None:
            everything = DirtyPages._all(self.npages, self.page_size, exact=True)
            self._put_back(everything, array, layout)
            return everything
        return put_back(dirty, lambda pages: self._put_back(pages, array, layout))

    def _put_back(self, pages: DirtyPages, array: npt.NDArray[np.uint8], layout: _Layout) -> None:
        extents = extents_of(pages, self.nbytes, "the memory")
        long = extents[:, 1] >= GIVEN_BACK * mmap.PAGESIZE
        if long.any():
            short = [extents[~long]]
            for begin, length in extents[long].tolist():
                whole, parts = self._backed(begin, begin + length, layout.copied)
                layout.memory.forget(whole)
                short.append(parts)
            extents = np.concatenate(short)
        if len(extents):
            copy_extents(self._source(), array, extents)

    def _backed(
        self, begin: int, end: int, copied: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Divide a range into whole pages that are mappings of files, and the rest."""
        size = mmap.PAGESIZE
        # A part of a diff may lie within one of the base.
        stops = np.maximum.accumulate(copied.sum(axis=1))
        part = copied[int(np.searchsorted(stops, begin, "right")) : int(np.searchsorted(copied[:, 0], end))]
        # Whole pages of the system around what was copied, which hold no other file's bytes than what is copied too.
        low = np.maximum(part[:, 0] // size * size, begin)
        high = np.minimum(-(-part.sum(axis=1) // size) * size, end)
        high = np.maximum.accumulate(high) if len(high) else high
        first = np.append(begin, high)
        last = np.append(low, end)
        inner = np.stack([-(-first // size) * size, last], axis=1)
        # The last page is mapped whole, and no page behind it is anybody's.
        inner[-1, 1] = -(-end // size) * size if end == self.nbytes else end // size * size
        inner[:, 1] = inner[:, 1] // size * size
        inner = inner[inner[:, 0] < inner[:, 1]]
        gaps = np.stack([np.append(begin, np.minimum(inner[:, 1], end)), np.append(inner[:, 0], end)], axis=1)
        gaps = gaps[gaps[:, 0] < gaps[:, 1]]
        return (
            np.stack([inner[:, 0], inner[:, 1] - inner[:, 0]], axis=1),
            np.stack([gaps[:, 0], gaps[:, 1] - gaps[:, 0]], axis=1),
        )

    def _source(self) -> Memory:
        with self._lock:
            self._check_open()
            if self._pristine is None:
                self._pristine = self._laid()
            return self._pristine.memory

    # ---- checking and closing ---------------------------------------------------------------------------------------

    def verify(self) -> Info:
        """Check every byte of every file of the chain, or wait for the check in the background to end.

        Returns
        -------
        Info

        Raises
        ------
        SnapshotError
            Something is damaged; `damage` says where.

        Notes
        -----
        The files are checked, not the memory: what was written there does not count.
        """
        thread = self._verification
        if thread is None:
            return reader.verify(self.path, search=self._search)
        thread.join()
        if isinstance(self._verified, Exception):
            raise self._verified
        assert self._verified is not None
        return self._verified

    def _verify_in_background(self) -> None:
        def run() -> None:
            try:
                self._verified = reader.verify(self.path, search=self._search)
            except Exception as error:
                self._verified = error

        self._verification = threading.Thread(target=run, name="dirtylog-verify", daemon=True)
        self._verification.start()

    def close(self) -> None:
        """Let go of the memory, which stays for as long as an array over it does; does nothing a second time."""
        with self._lock:
            self.closed = True
            self._array = self._layout = self._pristine = None
            self._arrays = {}

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Name the file and the size."""
        return f"<{'closed ' if self.closed else ''}Mapped: {self.path}, {self.npages} pages of {self.page_size} bytes>"


def open(path: StrPath, *, search: Sequence[StrPath] = (), verify: bool | str = False) -> Mapped:
    """Open the memory of a snapshot without reading it.

    Parameters
    ----------
    path : str or path
        The snapshot, full or diff.
    search : sequence of str or path
        Directories to look for parents in, after each file's own.
    verify : bool or "background"
        True: check every byte of the chain first. ``"background"``: in a thread; :meth:`Mapped.verify` waits for its
        end and raises what it found.

    Returns
    -------
    Mapped
        Memory that is copied on write; its arrays by name.

    Raises
    ------
    SnapshotError
        A file of the chain is missing, damaged or not the one its child was taken over.

    Notes
    -----
    O(chain + runs) and not O(memory), one file open at a time.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from dirtylog.sinks import snapshot
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     about = snapshot.save(directory + "/start", {"weights": np.arange(6.0).reshape(2, 3)}, state={"step": 7})
    ...     with snapshot.open(directory + "/start") as mapped:
    ...         mapped["weights"][0, 0] = 9.0  # a copy of the page, in this process alone
    ...         mapped["weights"].tolist(), mapped.state
    ([[9.0, 1.0, 2.0], [3.0, 4.0, 5.0]], {'step': 7})
    """
    if verify not in (False, True, "background"):
        raise ValueError(f"verify is {verify!r}; it must be False, True or 'background'")
    name, directories = checked_path(path), directories_of(search)
    if verify is True:
        reader.verify(name, search=directories)
    mapped = Mapped(name, directories)
    if verify == "background":
        mapped._verify_in_background()
    return mapped
