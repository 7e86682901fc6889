"""Holds the moment that a snapshot is of: by a child process, which writes the memory while this one goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dirtylog.errors import BackendUnavailable
from dirtylog.sinks.snapshot import _child
from dirtylog.sinks.snapshot.footer import SnapshotError
from dirtylog.sinks.snapshot.layout import Layout
from dirtylog.sinks.snapshot.space import Space

__all__ = ["MOMENTS", "check_moment", "write_by_child"]

MOMENTS = ("copy", "fork")


def check_moment(moment: str, space: Space) -> None:
    """Refuse a moment that cannot be held, before anything is written.

    Raises
    ------
    ValueError
        There is no such moment, or memory that others write too: a fork does not freeze it.
    BackendUnavailable
        The system has no such fork.
    """
    if moment not in MOMENTS:
        raise ValueError(f"moment is {moment!r}; it must be one of {', '.join(MOMENTS)}")
    if moment == "copy":
        return
    if not _child.available():
        raise BackendUnavailable("fork", "this system is not Linux", "save with moment='copy'")
    for region in space.regions:
        for mapping in region.mappings():
            if not mapping.permissions.endswith("p"):
                what = f"the array {region.name!r}" if region.name else "the memory"
                raise ValueError(
                    f"{what} is shared ({mapping.path or 'anonymous'}), so a fork does not hold its moment; save with "
                    "moment='copy', or a copy of it"
                )


def _pieces(space: Space, extents: npt.NDArray[np.int64], layout: Layout) -> npt.NDArray[np.int64]:
    """Say where extents of the page space go: address, offset in the file, length. Between arrays a hole is left."""
    parts = [np.empty((0, 3), np.int64)]
    if len(extents):
        for region, own, at, _ in space.parts(extents):
            pieces = layout.pieces(at, own + np.array([region.start, 0]))
            parts.append(np.column_stack([own[:, 0] + region.address, pieces[:, 2], pieces[:, 1]]))
    return np.ascontiguousarray(np.concatenate(parts))


def write_by_child(
    space: Space,
    descriptor: int,
    extents: npt.NDArray[np.int64],
    layout: Layout,
    path: str,
    taken: Callable[[], object],
) -> None:
    """Let a child write extents of the memory as it is now; `taken` is called as soon as writers may go on.

    Raises
    ------
    SnapshotError
        The child was ended by a signal.
    OSError
        The child could not be made, or could not write.
    """
    pieces = _pieces(space, extents, layout)
    if not len(pieces):
        taken()
        return
    answer = _child.write_moment(descriptor, pieces, lambda _: taken())
    if answer > 0:
        raise OSError(answer, os.strerror(answer), path)
    if answer < 0:
        raise SnapshotError(
            f"{path}: the process that held the moment was ended by {signal.Signals(-answer).name} before all was "
            "written; nothing has changed"
        )
