"""Says where the pages of a snapshot lie in its file: each at its own offset, or packed, one after the other.

A full snapshot is plain: page ``i`` is at ``i * page_size``, so the file is the memory and can be mapped as one. A
diff is packed: its pages lie one after the other, in the order of their numbers. Each place that is written apart is
work for the file system: 2600 single pages, scattered over a GiB, took five times as long to write as the same pages in
one piece. And a packed file is no longer than what it holds, for whoever copies it without an eye for holes. Each page
is at a multiple of the page size all the same, so runs can be mapped. Older diffs, which are plain, are read as before.

Whoever reads or writes the pages of a file asks here where they are. Only the runs of a whole chain, which are composed
in C, have a door of their own, ``placed`` in ``_footers.pyx``.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from dirtylog.sinks._bytes.extents import PackedExtents

__all__ = ["Layout"]

Extents = npt.NDArray[np.int64]


class Layout(IntEnum):
    """Where the pages lie; the value is the version that the trailer of the file says.

    What a file holds is a stream: the bytes of its pages in ascending order, the last one cut where the memory ends. A
    packed file begins with this stream, so no place in it can lie outside, twice, or in another order.
    """

    PLAIN = 2
    PACKED = 3

    @staticmethod
    def of(kind: str) -> Layout:
        """Return the layout in which a snapshot of a kind is written.

        All diffs are packed, however long their runs: one rule, and where runs are long it costs nothing.
        """
        return Layout.PACKED if kind == "diff" else Layout.PLAIN

    def data_bytes(self, nbytes: int, held: int) -> int:
        """Return how many bytes of data a file has, of memory of `nbytes` of which it holds `held`."""
        return held if self is Layout.PACKED else nbytes

    def window(self, begin: int, extents: Extents) -> Extents:
        """Return where in the file the part of the stream lies that begins at a byte of it and is of some extents."""
        if self is Layout.PLAIN:
            return extents
        return np.array([[begin, extents[:, 1].sum()]], np.int64)

    def pieces(self, begin: int, extents: Extents) -> npt.NDArray[np.int64]:
        """Return offset in memory, length and offset in the file of each extent of a part of the stream."""
        offsets = extents[:, 0]
        if self is Layout.PACKED:
            offsets = begin + np.cumsum(extents[:, 1]) - extents[:, 1]
        return np.column_stack([extents, offsets])

    def within(self, held: PackedExtents, extents: Extents) -> Extents:
        """Return where extents lie in the file that holds `held`; each lies within one of its runs."""
        if self is Layout.PLAIN:
            return extents
        run = held.extents[:, 0].searchsorted(extents[:, 0], side="right") - 1
        behind = held.extents[run].sum(axis=1) - extents[:, 0]
        return np.column_stack([held.ends[run] - behind, extents[:, 1]])
