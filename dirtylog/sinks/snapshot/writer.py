"""Writes snapshots: a full one, or a diff that holds only what was dirty."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog.sinks._bytes.extents import WINDOW, PackedExtents
from dirtylog.sinks._bytes.pageio import read_extents
from dirtylog.sinks._bytes.whole import whole
from dirtylog.sinks.snapshot import footer as footers
from dirtylog.sinks.snapshot.ancestry import ancestors, own_change
from dirtylog.sinks.snapshot.chain import (
    MAX_CHAIN,
    Info,
    Layer,
    Progress,
    StrPath,
    checked_path,
    describe,
    directories_of,
    still_there,
)
from dirtylog.sinks.snapshot.copying import copy
from dirtylog.sinks.snapshot.footer import Footer, Row, SnapshotError, hasher
from dirtylog.sinks.snapshot.layout import Layout
from dirtylog.sinks.snapshot.moment import check_moment, write_by_child
from dirtylog.sinks.snapshot.removal import announced
from dirtylog.sinks.snapshot.space import Space
from dirtylog.sinks.snapshot.staged import Staged

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from dirtylog._typing import Memory

__all__ = ["How", "Parent", "Source", "check_target", "digests", "parent_link", "save", "save_diff", "seal", "write"]


class Source(Protocol):
    """What a snapshot is made of: a page space that can be read by extents."""

    page_size: int
    nbytes: int
    npages: int
    named: bool

    def rows(self) -> tuple[Row, ...]:
        """Return what the footer says of the regions."""

    def gather(self, extents: npt.NDArray[np.int64], packed: memoryview) -> None:
        """Copy extents one after the other into `packed`."""


@dataclass(frozen=True, slots=True)
class How:
    """The options that all writers share."""

    epoch: int | None
    digest: str
    sync: bool
    replace: bool
    mode: int | None
    state: object
    progress: Progress | None
    moment: str = "copy"

    def __post_init__(self) -> None:
        """Refuse an epoch that no reader would take: it is written as it is."""
        if self.epoch is not None:
            object.__setattr__(self, "epoch", whole(self.epoch, "epoch", 0, (1 << 63) - 1))

    def told(self, done: int, total: int) -> None:
        """Say how far it is."""
        if self.progress is not None:
            self.progress(done, total)


class Parent(NamedTuple):
    """What a diff notes of its parent: name and identity; and the time that the parent noted, in nanoseconds."""

    name: str
    identity: str
    time: int


# From one snapshot to the next after the clock was put back, in nanoseconds: what a float of seconds tells apart.
_TICK = 1000


def _moment(directory: str, parent: Parent | None) -> int:
    """Return the time to note: the clock's, or one just after the newest snapshot there if the clock was put back.

    So the newest of a directory is the one that was written last. Nothing but names and time stamps is read as long as
    the clock goes on: a file is never modified before the time that it notes, see :func:`seal`.
    """
    now = time.time_ns()
    if parent is not None and parent.time <= now:
        return now
    latest = -1 if parent is None else parent.time
    with os.scandir(directory) as entries:
        for entry in entries:
            if not footers.plain_name(entry.name):
                continue
            # What is gone by now, or no snapshot, says nothing.
            with contextlib.suppress(OSError, SnapshotError):
                if entry.is_file() and entry.stat().st_mtime_ns > now:
                    with Layer(entry.path) as layer:
                        latest = max(latest, layer.footer.time)
    return min(max(now, latest + _TICK if latest >= now else 0), footers.MAX_TIME)


# Snapshots whose writer was interrupted after they had got their names: the call raised, the epoch was rolled back, and
# the file is there. Writing that name again is the retry, and replaces it.
_unfinished: dict[str, str] = {}


def _interrupted(path: str) -> bool:
    if path not in _unfinished:
        return False
    try:
        with Layer(path) as layer:
            return layer.footer.id == _unfinished[path]
    except (SnapshotError, OSError):
        return False


def check_target(path: str, how: How) -> None:
    """Refuse a target or options that will not do, before anything is written."""
    hasher(how.digest)
    if how.mode is not None and not 0o400 <= how.mode <= 0o777:
        raise ValueError(f"mode is {how.mode:#o}; it must be permissions from 0o400 to 0o777")
    if not how.replace and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "a snapshot is not overwritten, for its diffs would lose their parent "
                              "(pass replace=True, or another name)", path)  # fmt: skip
    if how.replace:
        # One look: between two, whoever prunes may have removed it, and then it is no file because it is gone.
        try:
            replaceable = stat.S_ISREG(os.stat(path).st_mode)
        except OSError as error:
            if error.errno is None:  # a signal handler's TimeoutError, say
                raise
            replaceable = not os.path.islink(path)
        if not replaceable:
            raise ValueError(f"{path} is not a regular file; only a file can be replaced")


def _is_file(path: str, name: str) -> bool:
    """Say whether two names are of one file; no, if either is removed meanwhile."""
    try:
        return os.path.samefile(path, name)
    except FileNotFoundError:
        return False


def seal(
    staged: Staged, footer: Footer, pages: DirtyPages, layout: Layout, data: int, chunks: list[bytes], state: bytes
) -> tuple[str, int]:
    """Write the footer behind so many bytes of data and publish the file; return its digest and what it takes on disk.

    Raises
    ------
    ValueError
        It would be larger than what is read.
    """
    header = footers.header_text(footer)
    if len(header) > footers.MAX_HEADER_BYTES:
        raise ValueError(f"the arrays' names and types take {len(header)} bytes; {footers.MAX_HEADER_BYTES} are read")
    if footers.values(header) > footers.MAX_VALUES:
        raise ValueError(f"the arrays' types and shapes have more than the {footers.MAX_VALUES} values that are read")
    _, held = footers.held_pages(pages)
    sections = [header, held, b"".join(chunks), state]
    length = sum(map(len, sections))
    if length > footers.MAX_FOOTER_BYTES:
        raise ValueError(
            f"the set of {footer.count} pages and its digests take {length} bytes; {footers.MAX_FOOTER_BYTES} are read"
        )
    offset = footers.footer_offset(data)
    trailer, digest = footers.trailer(offset, len(header), sections, layout)
    staged.write(b"".join([*sections, trailer]), offset)
    if footer.time > time.time_ns():
        # Where it cannot be, snapshots written by a clock that was put back are ordered by their names.
        with contextlib.suppress(OSError):
            os.utime(staged.descriptor, ns=(footer.time, footer.time))
    allocated = os.fstat(staged.descriptor).st_blocks * 512
    staged.publish()
    return digest, allocated


def digests(
    descriptor: int,
    packed: PackedExtents,
    layout: Layout,
    path: str,
    digest: Callable[[Buffer], bytes],
    told: Callable[[int], object] = lambda done: None,
) -> list[bytes]:
    """Return the digests of what was written to a file: what is there is what counts, not where it came from."""
    chunks = []
    staging = memoryview(bytearray(min(WINDOW, packed.total)))
    for begin, end, extents in packed.windows():
        part = staging[: end - begin]
        read_extents(descriptor, part, layout.window(begin, extents), packed=True, name=path)
        chunks.append(digest(part))
        told(end)
    return chunks


def write(
    path: str,
    source: Source,
    pages: DirtyPages,
    parent: Parent | None,
    how: How,
    vouch: Callable[[], object] = lambda: None,
) -> Info:
    """Write the pages of a source as a snapshot; `vouch` is called before it gets its name, and may refuse."""
    how = dataclasses.replace(how, replace=_interrupted(path) or how.replace)
    check_target(path, how)
    state = footers.encode_state(how.state)
    kind = "full" if parent is None else "diff"
    layout, packed = Layout.of(kind), PackedExtents(pages, source.nbytes)
    data = layout.data_bytes(source.nbytes, packed.total)
    digest = hasher(how.digest)
    identity = secrets.token_hex(16)
    directory = os.path.dirname(path)

    def told(done: int) -> None:
        how.told(done, packed.total)

    # Before the pages are copied: the memory of a moment that is no later than that.
    moment = _moment(directory, parent)
    with own_change(directory):
        staged = Staged(path, data, sync=how.sync, replace=how.replace, mode=how.mode)
    with staged:
        if how.moment == "fork":
            assert isinstance(source, Space)
            write_by_child(source, staged.descriptor, packed.extents, layout, path, lambda: told(0))
            # The memory has gone on, so the file is the moment.
            chunks = digests(staged.descriptor, packed, layout, path, digest, told)
        else:
            chunks = copy(source, packed, layout, staged.descriptor, path, digest, told)
        footer = Footer(
            id=identity,
            kind=kind,
            page_size=pages.page_size,
            nbytes=source.nbytes,
            count=pages.count,
            rows=len(packed.extents),
            exact=pages.exact,
            parent=parent and parent.name,
            parent_digest=parent and parent.identity,
            holds=None,
            time=moment,
            epoch=how.epoch,
            algorithm=how.digest,
            named=source.named,
            regions=source.rows(),
            state=len(state),
        )
        vouch()
        if how.replace and announced(path):
            raise SnapshotError(f"{path}: it is about to be removed or replaced; try again later")
        _unfinished[path] = identity
        with own_change(directory):
            own, allocated = seal(staged, footer, pages, layout, data, chunks, state)
        info = describe(path, footer, own, allocated, how.state, durable=staged.durable)
    _unfinished.pop(path, None)
    return info


def save(
    path: StrPath,
    memory: Memory | Mapping[str, Memory],
    *,
    state: object = None,
    page_size: int = 4096,
    epoch: int | None = None,
    digest: str | None = None,
    sync: bool = True,
    replace: bool = False,
    mode: int | None = None,
    moment: str = "copy",
    progress: Progress | None = None,
) -> Info:
    """Write a full snapshot of memory; pages that are zero become holes.

    Parameters
    ----------
    path : str or path
        The file.
    memory : array, buffer, or mapping of str to them
        Contiguous memory of any size; the last page may be partial. Several arrays by name are one page space: each
        begins at a page boundary, in the mapping's order.
    state : object, optional
        What else belongs to this moment: dicts, lists, text, numbers and bytes. At most 16 MiB.
    page_size : int
        In bytes, a power of two from 512.
    epoch : int, optional
        Number to note.
    digest : str, optional
        ``"xxh3_128"`` (needs xxhash) or ``"blake2b_128"``; by default the first if it is there.
    sync : bool
        Survive a power cut (fsync). Without, only the end of this process.
    replace : bool
        Take the place of a snapshot of that name. Its diffs cannot be restored any more.
    mode : int, optional
        Permissions of the file. By default 0600, for memory may hold secrets, or those of the file it replaces.
    moment : str
        ``"copy"``: what a page holds when it is copied. ``"fork"`` (Linux): what it holds when this is called, for a
        child process then has the memory and writes it. Writers may go on once `progress` is called with 0 bytes.
    progress : callable, optional
        Called with the bytes written and the bytes to write, once a MiB.

    Returns
    -------
    Info

    Raises
    ------
    OSError
        FileExistsError without `replace`; or the disk is full, ... What was there before is there still.
    ValueError, TypeError
        `memory` is not a contiguous buffer, `state` cannot be written, or the name will not do.

    Notes
    -----
    O(memory). For memory that is written meanwhile, collect the epoch first and save afterwards (I3): what changes
    during the copy is in the next epoch. Allocates 3 MiB and a bitmap. The GIL is released during the copies.
    From 8 MiB on, where there is a second processor, one thread copies and digests while another writes.

    The child of ``moment="fork"`` does nothing but write, in C: it needs no lock that another thread may have held,
    runs no handler of a fork, and sends no signal at its end. This call returns when all is written. Meanwhile the
    first write of this process to each page copies it, so memory may double. If the child is killed, the call raises
    and there is no snapshot. A full snapshot then has its zero pages written out. Memory shared with others is refused,
    for a fork does not hold it still; memory with ``MADV_WIPEONFORK`` is zero in a child.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from dirtylog import DirtyPages
    >>> memory = np.zeros(1 << 20, np.uint8)
    >>> memory[5000] = 1
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     base = save(directory + "/base", memory)
    ...     memory[9000] = 2
    ...     diff = save_diff(directory + "/diff", memory, DirtyPages.from_indices([2], 256), parent=directory + "/base")
    ...     bool((restore(directory + "/diff") == memory).all()), base.count, diff.count
    (True, 1, 1)
    """
    name = checked_path(path)
    how = How(epoch, digest or footers.best_digest(), sync, replace, mode, state, progress, moment)
    space = Space(memory, page_size)
    check_moment(moment, space)
    return _write_all(name, space, how)


def _write_all(name: str, space: Space, how: How) -> Info:
    """Write a full snapshot: what is not zero, or all that a child has, which does not look."""
    everything = DirtyPages._all(space.npages, space.page_size, exact=True)
    return write(name, space, space.nonzero() if how.moment == "copy" else everything, None, how)


def parent_link(
    name: str,
    parent: StrPath,
    source: Source,
    how: How,
    search: Sequence[StrPath],
    full_every: int | None = None,
    expected: str | None = None,
) -> tuple[Parent | None, Callable[[], None]]:
    """Check that a diff of `source` over `parent` could be restored; return what it notes of it, and a last check.

    It is to note no parent, and to be full, where the chain has `full_every` diffs.

    Raises
    ------
    SnapshotError
        A file of the parent's chain is missing or damaged, or the parent is of another geometry or another digest.
    ValueError
        The parent is elsewhere, is the target, or has the target among its ancestors; the epoch is not later.
    """
    parent_path = checked_path(parent)
    directories = directories_of(search)
    if name == parent_path:
        raise ValueError(f"{name!r} cannot be its own parent; give the diff another name")
    around = [os.path.dirname(path) for path in (name, parent_path)]
    if around[1] not in directories and not os.path.samefile(*around):
        raise ValueError(
            f"the parent is in {around[1]!r}; it must be in the diff's directory {around[0]!r}, or pass its directory "
            "as search=, here and whenever the diff is restored"
        )
    above = ancestors(parent_path, directories)
    tip, footer = above.tip, above.footer
    # Upkeep gives a file another digest, and the file then says whose memory it holds.
    if expected is not None and expected not in (tip.digest, tip.identity):
        raise SnapshotError(
            f"{parent_path}: this is another snapshot than the one of digest {expected}, over which the pages are "
            "dirty; save a full one"
        )
    full = full_every is not None and above.length > full_every
    if above.length >= MAX_CHAIN and not full:
        raise SnapshotError(
            f"{parent_path}: its chain has {above.length} files, and no more than {MAX_CHAIN} are read: write a full "
            "snapshot, or rebase"
        )
    if (footer.nbytes, footer.page_size) != (source.nbytes, source.page_size):
        raise SnapshotError(
            f"{parent_path}: the parent has {footer.nbytes} bytes in pages of {footer.page_size}; the memory has "
            f"{source.nbytes} in pages of {source.page_size}"
        )
    theirs = [(row[0], row[4], row[5]) for row in footer.regions]
    if theirs != [(row[0], row[4], row[5]) for row in source.rows()]:
        raise SnapshotError(
            f"{parent_path}: the parent has the arrays {[row[0] for row in theirs]} of {[row[2] for row in theirs]} "
            f"bytes; the memory has {[row[0] for row in source.rows()]} of {[row[5] for row in source.rows()]}"
        )
    if how.replace:
        for link in above.links[: above.length]:
            if _is_file(link.path, name):
                raise ValueError(
                    f"{name!r} is an ancestor of its parent {parent_path!r}; replacing it would destroy the chain: "
                    "give the diff another name"
                )
    if how.epoch is not None and footer.epoch is not None and how.epoch <= footer.epoch:
        raise ValueError(
            f"epoch is {how.epoch}; the parent {parent_path!r} is of epoch {footer.epoch}, and a diff must be later"
        )

    if full:
        return None, lambda: None

    def vouch() -> None:
        if announced(parent_path):
            raise SnapshotError(
                f"{parent_path}: it is about to be removed or replaced; take the diff over one that stays"
            )
        # The parent may have been replaced while the pages were copied; by a file of the same memory is no harm.
        if still_there([tip]):
            return
        try:
            with Layer(parent_path) as layer:
                same = layer.identity == tip.identity
        except SnapshotError:
            same = False
        if not same:
            raise SnapshotError(f"{parent_path}: the parent was replaced or removed while its diff was written")

    return Parent(os.path.basename(parent_path), tip.identity, footer.time), vouch


def save_diff(
    path: StrPath,
    memory: Memory | Mapping[str, Memory],
    pages: DirtyPages | Mapping[str, DirtyPages],
    *,
    parent: StrPath,
    state: object = None,
    epoch: int | None = None,
    digest: str | None = None,
    sync: bool = True,
    replace: bool = False,
    mode: int | None = None,
    moment: str = "copy",
    full_every: int | None = None,
    parent_digest: str | None = None,
    search: Sequence[StrPath] = (),
    progress: Progress | None = None,
) -> Info:
    """Write the pages that changed since `parent`, one after the other.

    Parameters
    ----------
    path, memory, state, epoch, digest, sync, replace, mode, moment, progress
        As for :func:`save`. `memory` is all of it, not only what changed; arrays by name are those of the parent. An
        `epoch` is later than the parent's, where both are noted.
    pages : DirtyPages, or mapping of str to DirtyPages
        What to write; more than changed is fine, less is not. Pages of the whole page space, or of each array.
    parent : str or path
        The snapshot, full or diff, that the pages are dirty against; in the same directory, or in one of `search`.
    full_every : int, optional
        Write a full snapshot instead where the parent's chain has so many diffs, so that no chain grows longer.
    parent_digest : str, optional
        The `digest` that the parent's :class:`Info` had when it was written. If another snapshot has its name by now,
        it is refused; by default whatever has the name is believed. One that was merged or flattened since is the same.
    search : sequence of str or path
        Directories to look for ancestors in, after each file's own.

    Returns
    -------
    Info
        Its `kind` is ``"diff"``, or ``"full"`` if it was the turn of one.

    Raises
    ------
    SnapshotError
        The parent or one of its ancestors is missing or damaged, or of another geometry or another digest.
    ValueError
        `pages` does not describe `memory`; the parent is elsewhere; the target is an ancestor of its parent;
        `full_every` is less than 1.
    OSError
        As for :func:`save`.

    Notes
    -----
    O(dirty) over the diff that this process wrote last, and O(dirty + chain) over another: before anything is written,
    the chain is looked through to its base, sizes and footers, for a diff that cannot be restored would be no snapshot.
    Of a chain that this process has looked through, a few files are looked at again, unless somebody else has changed
    its directory. Raises before the epoch is committed if called inside
    ``with observer.collect() as epoch``, so a failure leaves the pages dirty for the next try. Clear before copy (I3)
    holds there because collecting has cleared. If an interrupt (Ctrl-C) arrives just after the file has got its name,
    the call raises all the same; the same call again then replaces that file.
    """
    name = checked_path(path)
    how = How(epoch, digest or footers.best_digest(), sync, replace, mode, state, progress, moment)
    first = next(iter(pages.values()), None) if isinstance(pages, Mapping) else pages
    if not isinstance(first, DirtyPages):
        raise TypeError(f"pages is {type(first).__name__}; DirtyPages are needed")
    if full_every is not None:
        full_every = whole(full_every, "full_every", 1, way_out=", or None")
    space = Space(memory, first.page_size)
    held = space.pages(pages)
    check_moment(moment, space)
    link, vouch = parent_link(name, parent, space, how, search, full_every, parent_digest)
    return _write_all(name, space, how) if link is None else write(name, space, held, link, how, vouch)
