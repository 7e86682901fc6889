"""Reads snapshots: restores the memory of a chain, verifies every byte of it, says what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog.sinks._bytes.extents import WINDOW
from dirtylog.sinks._bytes.pageio import data_extents, read_extents
from dirtylog.sinks.snapshot import footer as footers
from dirtylog.sinks.snapshot.chain import (
    ChainMovedError,
    Info,
    Layer,
    Progress,
    StrPath,
    checked_path,
    describe,
    directories_of,
    follow,
    lay,
    settled,
    windows,
)
from dirtylog.sinks.snapshot.footer import Footer, SnapshotError
from dirtylog.sinks.snapshot.index import Index, index
from dirtylog.sinks.snapshot.layout import Layout
from dirtylog.sinks.snapshot.parts import Written, extents_of, fetch, put_back
from dirtylog.sinks.snapshot.space import Space, blank, dtype_of, said

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["info", "restore", "verify"]

# Pages that are looked at together when the holes of a file are checked.
SPAN = 1 << 20


def _outputs(footer: Footer, out: Any, name: str) -> Space:
    """Return the caller's memory as the snapshot's page space."""
    space = Space(out, footer.page_size, writable=True)
    if footer.named != space.named:
        raise ValueError(
            f"out must be {'a mapping of names to arrays' if footer.named else 'one buffer'}, as was saved"
        )
    if footer.named:
        names = [row[0] for row in footer.regions]
        if set(names) != set(out):
            raise ValueError(f"out has {sorted(out)}; the snapshot has {sorted(names)}")
        space = Space({name: out[name] for name in names}, footer.page_size, writable=True)
    for region, row in zip(space.regions, footer.regions, strict=True):
        if region.nbytes != row[5]:
            what = f"out[{row[0]!r}]" if footer.named else "out"
            raise ValueError(f"{what} has {region.nbytes} bytes; the snapshot has {row[5]}")
        if not region.is_like(row, name):
            what = f"out[{row[0]!r}]" if footer.named else "out"
            raise ValueError(
                f"{what} is {said(region.dtype, region.shape, region.order)}; the snapshot has "
                f"{said(dtype_of(row[1], name), row[2], row[3])}, and its values would be others: pass an array like "
                "that one, or bytes"
            )
    return space


def restore(
    path: StrPath,
    *,
    out: Memory | Mapping[str, Memory] | None = None,
    only: DirtyPages | Written | Mapping[str, DirtyPages | Written] | None = None,
    limit: int = 1 << 36,
    search: Sequence[StrPath] = (),
    progress: Progress | None = None,
) -> Any:
    """Read the memory of a snapshot back, laying each diff of its chain over what it was taken over.

    Parameters
    ----------
    path : str or path
        The snapshot.
    out : array, buffer, or mapping of str to them, optional
        Writable memory like what was saved: arrays of the same type, shape and order, or bytes, by default new arrays.
    only : DirtyPages, tracker, or mapping of str to them, optional
        Put back only these pages of `out`: pages of the whole memory; or what tracks it, which then starts clean again;
        or for arrays by name, the pages or the tracker of each.
    limit : int
        Refuse to allocate more bytes than this (64 GiB).
    search : sequence of str or path
        Directories to look for parents in, after each file's own.
    progress : callable, optional
        Called with the bytes read and the bytes to read.

    Returns
    -------
    array, or dict of str to array
        `out`, or new: the array as it was saved (uint8 if it was not an array), or the arrays by their names.

    Raises
    ------
    SnapshotError
        A file of the chain is missing, damaged or not the one its child was taken over. Footers are checked before
        `out` is touched; where data turns out to be damaged, `out` is left half-written.
    ValueError
        `out` has another size, or is an array of another type, shape or order; the snapshot is larger than `limit`.

    Notes
    -----
    O(memory + sum of the chain), one file open at a time. Every digest is checked on the way. Safe beside writers: what
    is replaced meanwhile is read again.

    With `only`, O(chain + pages): of each file the footer and what is asked for, whose digests are not checked, since
    each is of a whole MiB. Let nobody write meanwhile. To put back the same snapshot again and again,
    :meth:`Mapped.reset` does not even look at the files.

    Examples
    --------
    >>> import tempfile, numpy as np, dirtylog as dl
    >>> from dirtylog.sinks import snapshot
    >>> memory = dl.zeros(1 << 20, np.uint8)
    >>> with tempfile.TemporaryDirectory() as directory, dl.track(memory) as tracker:
    ...     about = snapshot.save(directory + "/start", memory)
    ...     memory[5000] = 7
    ...     back = snapshot.restore(directory + "/start", out=memory, only=tracker)
    ...     int(memory[5000]), bool(tracker.peek())
    (0, False)
    """
    name = checked_path(path)
    directories = directories_of(search)
    if only is not None:
        if out is None:
            raise ValueError("only= puts pages back into memory that is there: pass it as out=")
        _put_back(name, directories, out, only)
        return out

    def work() -> Any:
        links, footer = follow(name, directories)
        if out is None:
            if footer.nbytes > limit:
                raise ValueError(
                    f"{path}: restoring takes {footer.nbytes} bytes, the limit is {limit}; raise limit, or pass out"
                )
            result, arrays = blank(footer, name)
            space = Space(arrays if footer.named else result, footer.page_size, writable=True)
        else:
            result, space = out, _outputs(footer, out, name)
            space.clear()
        lay(links, space.scatter, progress)
        return result

    return settled(work)


def _put_back(name: str, directories: list[str], out: Any, only: Any) -> None:
    """Put back pages of `out`; each tracker starts clean once all of its pages are back."""
    found: Index = settled(lambda: index(name, directories))
    space = _outputs(found.footer, out, name)

    def back(start: int, nbytes: int, what: str, written: DirtyPages | Written) -> None:
        def put(pages: DirtyPages) -> None:
            wanted = extents_of(pages, nbytes, what) + np.array([start, 0])

            def work() -> None:
                nonlocal found
                try:
                    fetch(found, wanted, space)
                except ChainMovedError:
                    found = index(name, directories)
                    raise

            settled(work)

        put_back(written, put)

    if not isinstance(only, Mapping):
        back(0, space.nbytes, "the memory", only)
        return
    names = [region.name for region in space.regions]
    if not space.named or not set(only) <= set(names):
        raise ValueError(f"only has {sorted(only)}; the memory has {names}: pages by name go with memory by name")
    for region in space.regions:
        if region.name in only:
            back(region.start, region.nbytes, f"the array {region.name!r}", only[region.name])


def verify(path: StrPath, *, search: Sequence[StrPath] = (), progress: Progress | None = None) -> Info:
    """Check every byte of every file of a snapshot's chain.

    Parameters
    ----------
    path : str or path
        The snapshot.
    search : sequence of str or path
        Directories to look for parents in, after each file's own.
    progress : callable, optional
        Called with the bytes checked and the bytes to check.

    Returns
    -------
    Info
        Of the snapshot, which is sound.

    Raises
    ------
    SnapshotError
        It is not; `damage` says where, one line for each place.

    Notes
    -----
    Pages that a file does not hold must read as zeros: a bit that flipped in a hole is found as well. The digests find
    accidents, not an attacker.
    """
    name = checked_path(path)
    directories = directories_of(search)

    def work() -> Info:
        links, _ = follow(name, directories)
        damage: list[str] = []
        damaged = damage.append
        staging = memoryview(bytearray(WINDOW))
        total, done = sum(link.total for link in links), 0
        for link in links:
            with Layer(link.path, link.digest) as layer:

                def check(part: memoryview, extents: npt.NDArray[np.int64], sound: bool, layer: Layer = layer) -> None:
                    nonlocal done
                    if not sound:
                        damaged(f"{layer.where(extents)}: the data does not match its digest")
                    done += part.nbytes
                    if progress is not None:
                        progress(done, total)

                layer.read(staging, check)
                damage += _not_zero(layer, staging)
                about = describe(name, layer.footer, link.digest, layer.allocated, layer.state())
        if damage:
            raise SnapshotError(f"{name}: damaged: {'; '.join(damage[:10])}", tuple(damage))
        return about

    found: Info = settled(work)
    return found


def _not_zero(layer: Layer, staging: memoryview) -> Iterator[str]:
    """Find data in pages that a file does not hold, and between its data and its footer."""
    footer, place = layer.footer, layer.place
    packed = place.layout is Layout.PACKED
    if not packed:
        yield from _not_holes(layer, staging)
    behind = footers.read_whole(layer.descriptor, place.data, place.offset - place.data, layer.path)
    if any(behind):
        last = max(int(block[-1].sum()) for block in layer.blocks()) - 1 if packed else footer.npages - 1
        yield f"{layer.path}: pages {last} to {last}: there is data behind the last page"


def _not_holes(layer: Layer, staging: memoryview) -> Iterator[str]:
    footer = layer.footer
    size = footer.page_size
    data = data_extents(layer.descriptor, footer.nbytes, name=layer.path)
    first = data[:, 0] // size
    found = np.stack([first, (data.sum(axis=1) + size - 1) // size - first], axis=1)
    for runs in _without(found, layer.blocks()):
        for nbytes, extents in windows(iter([runs]), size, footer.nbytes):
            part = staging[:nbytes]
            read_extents(layer.descriptor, part, extents, packed=True, name=layer.path)
            if np.frombuffer(part, np.uint8).any():
                yield f"{layer.where(extents)}: there is data in a page that the snapshot does not hold"


def _without(found: npt.NDArray[np.int64], blocks: Iterator[npt.NDArray[np.int64]]) -> Iterator[npt.NDArray[np.int64]]:
    """Take the runs in `blocks` away from the runs in `found`, both ascending, a block at a time."""
    at = 0
    end = int(found[-1].sum()) if len(found) else 0
    for block in blocks:
        last = int(block[-1].sum())
        yield from _difference(found, block, at, last)
        at = last
    if at < end:
        yield from _difference(found, np.empty((0, 2), np.int64), at, end)


def _difference(
    found: npt.NDArray[np.int64], block: npt.NDArray[np.int64], begin: int, end: int
) -> Iterator[npt.NDArray[np.int64]]:
    # Both as sets over the span alone; in parts, so that a set in between is never large.
    for low in range(begin, end, SPAN):
        high = min(low + SPAN, end)
        there, held = (DirtyPages.from_runs(_clipped(runs, low, high), high - low) for runs in (found, block))
        rest = (there - held).runs()
        if len(rest):
            yield rest + np.array([low, 0])


def _clipped(runs: npt.NDArray[np.int64], low: int, high: int) -> npt.NDArray[np.int64]:
    ends = runs.sum(axis=1)
    part = slice(int(np.searchsorted(ends, low, "right")), int(np.searchsorted(runs[:, 0], high, "left")))
    first = np.maximum(runs[part, 0], low)
    return np.stack([first - low, np.minimum(ends[part], high) - first], axis=1)


def info(path: StrPath) -> Info:
    """Say what a snapshot is, from its footer alone; neither its data nor its parents are read.

    Raises
    ------
    SnapshotError
        There is none, or its footer cannot be used.
    """
    name = checked_path(path)
    with Layer(name) as layer:
        return describe(name, layer.footer, layer.place.digest, layer.allocated, layer.state())
