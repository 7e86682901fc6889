"""A directory of checkpoints: its files, which of them are kept, and what changed from one to another.

Each file is one snapshot of all arrays, named by a number that goes up. Its state is what :class:`Checkpoint` notes:
the step, how many are kept, since which file the steps of one run of a program rise and how far they have come, the
arrays that are empty, if there are any, and the user's own. A full snapshot may lie below those that are kept, because
they are diffs over it; it is not listed.
"""

from __future__ import annotations

import bisect
import functools
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog._core import compare_pages
from dirtylog.sinks import snapshot
from dirtylog.sinks.checkpoint import empties
from dirtylog.sinks.snapshot import Entry, Info, SnapshotError
from dirtylog.sinks.snapshot.chain import RETRIES, Layer, StrPath, follow, settled
from dirtylog.sinks.snapshot.footer import Footer
from dirtylog.sinks.snapshot.space import arrays_of, dtype_of

if TYPE_CHECKING:
    from dirtylog._typing import Memory
    from dirtylog.sinks.snapshot.chain import Progress

__all__ = ["Change", "Record", "about", "changed", "files", "find", "history", "kept", "name_of", "newest", "to_keep"]

P = ParamSpec("P")
T = TypeVar("T")

# Of what no tracker has counted.
PAGE_SIZE = 4096
_NAME = re.compile(r"(\d{10})\.ckpt")


@dataclass(frozen=True, slots=True)
class Record:
    """One checkpoint that is kept.

    Parameters
    ----------
    step : int or None
        What it is loaded by; None of what the background thread saved.
    time : float
        When, in seconds since 1970.
    info : Info or Version
        Of its file: path, kind, pages, names, bytes on disk. Of a store, its :class:`dirtylog.sinks.store.Version`. The
        user's state is not read.
    """

    step: int | None
    time: float
    info: Any


@dataclass(frozen=True, slots=True)
class Change:
    """What changed in one array from one checkpoint to another.

    Parameters
    ----------
    pages : DirtyPages
        Pages of the array: page `i` is bytes ``[i * page_size, (i + 1) * page_size)`` of it.
    rows : int64 array
        Indices along its first axis that have a byte in one of these pages.
    """

    pages: DirtyPages
    rows: npt.NDArray[np.int64]


def name_of(number: int) -> str:
    """Return the name of the file of a number."""
    return f"{number:010d}.ckpt"


def files(directory: str) -> list[str]:
    """List the checkpoint files, oldest first."""
    try:
        names = sorted(name for name in os.listdir(directory) if _NAME.fullmatch(name))
    except FileNotFoundError:
        return []
    return [os.path.join(directory, name) for name in names]


def newest(directory: str) -> tuple[int, int]:
    """Return the number of the newest checkpoint file, 0 if there is none, and how many files there are."""
    there = files(directory)
    return (_number(there[-1]) if there else 0), len(there)


def next_path(directory: str) -> str:
    """Return the path of the next file of a directory."""
    return os.path.join(directory, name_of(newest(directory)[0] + 1))


def noted_for(path: str, state: Any) -> dict[str, Any]:
    """Return what is noted with a checkpoint that came from elsewhere: its step and state, or the state alone."""
    there = files(os.path.dirname(path))
    try:
        came = _note(state, "")
    except SnapshotError:
        came = {"step": None, "user": state}
    keep = about(there[-1])["keep"] if there else None
    # A run of its own: what lies before it is of other steps.
    number, step = _number(path), came["step"]
    noted = {"step": step, "keep": keep, "since": number, "reached": -1 if step is None else step, "user": came["user"]}
    return {**noted, "empty": came["empty"]} if "empty" in came else noted


def _beside_writers(look: Callable[Concatenate[StrPath, P], T]) -> Callable[Concatenate[StrPath, P], T]:
    """Let a function look at a directory again if a file is gone by now that was listed: it is not kept any more."""

    @functools.wraps(look)
    def again(directory: StrPath, /, *arguments: P.args, **options: P.kwargs) -> T:
        path = os.path.abspath(os.fspath(directory))
        for _ in range(RETRIES):
            listed = files(path)
            try:
                return look(directory, *arguments, **options)
            except SnapshotError:
                if not set(listed) - set(files(path)):
                    raise
        raise SnapshotError(f"{path}: a writer removed what was being looked at {RETRIES} times; try again")

    return again


def _number(path: str) -> int:
    return int(os.path.basename(path)[:10])


def about(path: str) -> dict[str, Any]:
    """Return what was noted with a checkpoint."""
    return _noted(snapshot.info(path))


def _noted(info: Info) -> dict[str, Any]:
    return _note(info.state, info.path)


def _note(state: Any, path: str) -> dict[str, Any]:
    if not isinstance(state, dict) or set(state) - {"empty"} != {"step", "keep", "since", "reached", "user"} or not all(
        type(state[key]) is int or (state[key] is None and key in ("step", "keep"))
        for key in ("step", "keep", "since", "reached")
    ):  # fmt: skip
        raise SnapshotError(f"{path}: this snapshot was not written by a Checkpoint; move it to another directory")
    return state


def _kept_files(directory: str) -> list[str]:
    """List the files that the newest that can be read says are kept, oldest first."""
    there = files(directory)
    for path in reversed(there):
        try:
            keep = about(path)["keep"]
        except SnapshotError:
            continue
        return there[-keep if keep else 0 :]
    return there


def kept(directory: str) -> list[tuple[int | None, str]]:
    """List the steps that are kept and their files, oldest first; what the thread saved has none."""
    return [(_step(path), path) for path in _kept_files(directory)]


def find(directory: StrPath, step: int | None) -> str:
    """Return the file of a step, or the latest.

    Raises
    ------
    KeyError
        There is none.

    Warns
    -----
    RuntimeWarning
        The step was found, but a newer file cannot be read, which may be of this step, too.

    Notes
    -----
    Reads the footer of the newest, and for a step O(log files) more of each run of a program, newest first; all of them
    if one that it comes across is damaged.
    """
    path = os.path.abspath(os.fspath(directory))
    there = files(path) if step is None else _kept_files(path)
    if there and step is None:
        about(there[-1])
        return there[-1]
    try:
        found = None if step is None else _found(there, step)
    except SnapshotError:
        found = _found_beside_damage(there, step)
    if found is not None:
        return found
    said = f"{os.fspath(directory)} has no checkpoint" + ("" if step is None else f" of step {step}")
    steps = [str(number) for number in map(_step, there[-10:]) if number is not None]
    raise KeyError(f"{said}; it has those of {', '.join(steps)}" if steps else said)


def _found(there: list[str], step: int) -> str | None:
    end = len(there)
    while end:
        # Of one run of a program, and as long as its steps rise, what was reached rises from file to file.
        first = bisect.bisect_left(there, about(there[end - 1])["since"], 0, end, key=_number)
        at = bisect.bisect_left(there, step, first, end, key=lambda path: about(path)["reached"])
        if at < end and about(there[at])["step"] == step:
            return there[at]
        # The run before; whatever a file says, this comes to an end.
        end = min(first, end - 1)
    return None


def _found_beside_damage(there: list[str], step: int | None) -> str:
    """Look at each file, newest first. Where none is of this step, one that cannot be read may have been."""
    damage: SnapshotError | None = None
    # Those that cannot be read, and the first file of the runs that are newer: within a run, steps only rise.
    newer: list[tuple[SnapshotError, float]] = []
    since = float("inf")
    for path in reversed(there):
        try:
            noted = about(path)
        except SnapshotError as error:
            if not os.path.lexists(path):
                raise  # gone, and not damaged
            damage = damage or error
            newer.append((error, since))
            continue
        since = min(since, noted["since"])
        if noted["step"] != step:
            continue
        for damaged, first in newer:
            if first > _number(path):
                warnings.warn(
                    f"{damaged}; step {step} is taken from {os.path.basename(path)}, which is older",
                    RuntimeWarning,
                    stacklevel=4,
                )
                break
        return path
    raise damage or KeyError(step)


def _step(path: str) -> int | None:
    step: int | None = about(path)["step"]
    return step


@_beside_writers
def history(directory: StrPath) -> list[Record]:
    """List the checkpoints that are kept, oldest first."""
    return [_record(path) for path in _kept_files(os.path.abspath(os.fspath(directory)))]


def _record(path: str) -> Record:
    info = snapshot.info(path)
    return Record(_noted(info)["step"], info.time, info)


@_beside_writers
def survey(directory: StrPath) -> list[tuple[str, Record | None, str | None]]:
    """List the files that are kept, oldest first: path, and what it is, or why it cannot be read."""
    found: list[tuple[str, Record | None, str | None]] = []
    for path in _kept_files(os.path.abspath(os.fspath(directory))):
        try:
            found.append((path, _record(path), None))
        except SnapshotError as error:
            if not os.path.lexists(path):
                raise
            found.append((path, None, str(error).removeprefix(f"{path}: ")))
    return found


@_beside_writers
def steps(directory: StrPath) -> list[int]:
    """List the steps that are kept, oldest first."""
    return [step for step, _ in kept(os.path.abspath(os.fspath(directory))) if step is not None]


@_beside_writers
def load(
    directory: StrPath,
    step: int | None,
    into: Mapping[str, Memory] | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Map the arrays of a checkpoint, or read them into others."""
    path = find(directory, step)
    if verify:
        snapshot.verify(path, progress=progress)
    if into is not None:
        rest = empties.split(into, _empty(path), path)
        if rest or _footer(path).named:
            snapshot.restore(path, out=rest, progress=progress)
        return into
    with snapshot.open(path) as mapped:
        return _all_of(path, mapped.restored())


@_beside_writers
def whole(
    directory: StrPath, step: int | None, names: Sequence[str] | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Read the arrays of a checkpoint, or those of some names, and check them."""
    path = find(directory, step)
    if names is None:
        return _all_of(path, snapshot.restore(path, progress=progress))
    empty = empties.woven({}, _empty(path), path)
    empties.check_names(names, [*empty, *(row[0] for row in _footer(path).regions if row[0])])
    # Digests are of pages of all arrays: all are checked, a window at a time, and then these alone are read.
    snapshot.verify(path, progress=progress)
    return {name: empty[name] if name in empty else snapshot.read(path, region=name) for name in names}


def _empty(path: str) -> Any:
    return about(path).get("empty", [])


def _all_of(path: str, found: Any) -> dict[str, Any]:
    """Put the empty arrays among those that were read; where all are empty, that was a byte without a name."""
    return empties.woven(found if isinstance(found, dict) else {}, _empty(path), path)


@_beside_writers
def state_of(directory: StrPath, step: int | None) -> Any:
    """Return the state that was saved with a checkpoint."""
    return about(find(directory, step))["user"]


@_beside_writers
def described(directory: StrPath, step: int | None) -> tuple[int | None, list[tuple[str, str, list[int], int]], Any]:
    """Return the step of a checkpoint, name, type, shape and bytes of each of its arrays, and its state."""
    path = find(directory, step)
    noted = about(path)
    arrays = [
        (name, str(dtype_of(kind, path)), list(shape), length)
        for name, kind, shape, _, _, length in _footer(path).regions
        if name
    ]
    return noted["step"], empties.described(arrays, noted.get("empty", []), path), noted["user"]


@_beside_writers
def diff(directory: StrPath, a: int, b: int | None) -> dict[str, Change]:
    """Say what changed from the older of two steps to the newer."""
    older, newer = sorted(find(directory, step) for step in (a, b))
    return changed(older, newer)


def to_keep(entries: Sequence[Entry], keep: int) -> set[str]:
    """Choose what is kept of a directory: the newest, what is not ours, and a base that is cheaper kept than written.

    The oldest that is kept takes in the diffs below it. Down to the full snapshot, that would write all memory again;
    while what changed since is less than half of it, the full one stays below.
    """
    ours = sorted(entry.path for entry in entries if _NAME.fullmatch(os.path.basename(entry.path)))
    chosen = {entry.path for entry in entries} - set(ours[:-keep])
    by_path = {entry.path: entry for entry in entries}
    entry, count = by_path[ours[-keep:][0]], 0
    while entry.info is not None and entry.info.kind == "diff" and entry.parent in by_path:
        count += entry.info.count
        entry = by_path[entry.parent]
        if entry.path in chosen:
            return chosen
    if entry.info is not None and 2 * count < entry.info.npages:
        chosen.add(entry.path)
    return chosen


# ---- what changed ----------------------------------------------------------------------------------------------------


def _written(older: str, newer: str) -> tuple[Footer, DirtyPages] | None:
    """Return the pages that the files above `older` hold, up to `newer`; None if it is not below it."""
    links, tip = follow(newer)
    ours = [i for i, link in enumerate(links) if link.path == older]
    if not ours:
        return None
    pages = DirtyPages.from_indices([], tip.npages, tip.page_size)
    for link in links[ours[0] + 1 :]:
        with Layer(link.path, link.digest) as layer:
            pages |= layer.pages()
    return tip, pages


def _footer(path: str) -> Footer:
    with Layer(path) as layer:
        return layer.footer


def differing(older: Any, newer: npt.NDArray[Any], page_size: int) -> DirtyPages:
    """Compare an array with an older one; where they are not alike, all of it differs."""
    if older is None or (older.dtype, older.shape, older.strides) != (newer.dtype, newer.shape, newer.strides):
        return DirtyPages._all(-(-newer.nbytes // page_size), page_size, exact=True)
    return compare_pages(np.ravel(newer, "K").view(np.uint8), np.ravel(older, "K").view(np.uint8), page_size)


def changed(older: str, newer: str) -> dict[str, Change]:
    """Say which pages and rows of which arrays differ between two files of a directory.

    Where the one is below the other in a chain, the pages that were written in between; else both are read.
    """
    found: tuple[Footer, DirtyPages] | None = settled(lambda: _written(older, newer))
    before: Mapping[str, Any] = {}
    after: Mapping[str, Any] = {}
    footer = _footer(newer)
    if found is not None:
        footer = found[0]
        # Address space alone: the shapes and strides matter, and no byte of it is touched.
        after = arrays_of(footer.regions, np.empty(footer.nbytes, np.uint8), newer)
    else:
        before, after = (_all_of(path, snapshot.restore(path)) for path in (older, newer))
    answer = {}
    for name, _, _, _, start, length in footer.regions:
        if not name:  # all arrays are empty
            continue
        first, count = start // footer.page_size, -(-length // footer.page_size)
        if found is not None:
            runs = found[1].runs()
            low, high = np.maximum(runs[:, 0], first), np.minimum(runs.sum(axis=1), first + count)
            own = np.stack([low - first, high - low], axis=1)[high > low]
            pages = DirtyPages.from_runs(own, count, footer.page_size)
        else:
            pages = differing(before.get(name), after[name], footer.page_size)
        if pages:
            answer[name] = Change(pages, pages.rows(np.atleast_1d(after[name])))
    return answer
