"""What a migration sends and fills: one page space over an array, arrays by name, or the memory of a process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.flat import flat_array
from dirtylog.sinks.migrate.wire import MAX_LAYOUT, WireError
from dirtylog.sinks.snapshot import footer as footers
from dirtylog.sinks.snapshot.footer import Row, SnapshotError
from dirtylog.sinks.snapshot.space import Space, arrays_of, check_row

if TYPE_CHECKING:
    from dirtylog._typing import Memory
    from dirtylog.sinks.snapshot.writer import Source
    from dirtylog.sources.process import Process

__all__ = ["Outside", "layout_of", "room", "source_of"]


class Outside:
    """The memory of an attached process, as a page space: as its regions are at each look.

    Parameters
    ----------
    process : Process
        Whose pages they are. It has been harvested just before: that is when it learns what is mapped.
    """

    named: bool = False

    def __init__(self, process: Process) -> None:
        self.process: Process = process
        self.page_size: int = process.page_size
        self.npages: int = process.npages
        self.nbytes: int = process.npages * process.page_size
        self.paused: str | None = None

    def _memory(self) -> Any:
        from dirtylog.sinks.snapshot.processes import Memory as MemoryOfProcess

        return MemoryOfProcess(self.process.pid, self.process.regions, self.npages)

    def rows(self) -> tuple[Row, ...]:
        """Return what a footer would say: bytes."""
        rows: tuple[Row, ...] = self._memory().rows()
        return rows

    def gather(self, extents: npt.NDArray[np.int64], packed: memoryview) -> None:
        """Read extents one after the other into `packed`; what is not mapped any more is zeros."""
        self._memory().gather(extents, packed)

    def state(self) -> Any:
        """Say where the memory lies, as snapshots of a process do."""
        return self._memory().state(self.paused)


def source_of(memory: Memory | Mapping[str, Memory] | Process | Source, page_size: int) -> Source:
    """Return memory of any kind as one page space.

    Raises
    ------
    TypeError, ValueError
        It is not contiguous, or a name will not do.
    """
    found: Any = memory
    if callable(getattr(memory, "gather", None)) and callable(getattr(memory, "rows", None)):
        return found  # type: ignore[no-any-return]
    if callable(getattr(memory, "harvest", None)) and hasattr(memory, "regions"):
        return Outside(found)
    return Space(found, page_size)


def layout_of(source: Source) -> bytes:
    """Return the text that says which arrays come; nothing for memory without names.

    Raises
    ------
    ValueError
        It would be too long.
    """
    if not source.named:
        return b""
    text = json.dumps(source.rows(), separators=(",", ":")).encode("ascii")
    if len(text) > MAX_LAYOUT or footers.values(text) > footers.MAX_VALUES:
        raise ValueError(
            f"the names, types and shapes of the arrays take {len(text)} bytes as JSON, at most {MAX_LAYOUT} are sent; "
            "send fewer arrays at once"
        )
    return text


def _rows(text: bytes, nbytes: int, page_size: int) -> tuple[Row, ...]:
    try:
        if footers.values(text) > footers.MAX_VALUES:
            raise ValueError(f"it has more than {footers.MAX_VALUES} values")
        rows: tuple[Row, ...] = footers.regions_of(json.loads(text.decode("ascii")), nbytes, page_size, True)
    except (ValueError, TypeError, RecursionError) as error:
        raise WireError(f"the sender's arrays cannot be made: {error}") from None
    return rows


def room(
    nbytes: int,
    page_size: int,
    layout: bytes,
    out: Memory | Mapping[str, Memory] | Callable[[int], Memory] | None,
    limit: int,
) -> tuple[Any, Space]:
    """Check the arrays that are announced, and make room for them: what the caller is given, and its page space.

    Raises
    ------
    WireError
        They cannot be, are more than `limit`, or do not fit `out`.
    Exception
        What `out` raises.
    """
    rows = _rows(layout, nbytes, page_size) if layout else ()
    if rows:
        try:
            # Before there is memory: their types and shapes are those of so many bytes each.
            for each in rows:
                check_row(each, "the sender")
        except SnapshotError as error:
            raise WireError(str(error)) from None
    if out is not None and not callable(out):
        return _given(rows, nbytes, page_size, out)
    if nbytes > limit:
        raise WireError(f"the sender announces {nbytes} bytes, the limit is {limit}; raise limit, or pass out")
    made: Any = np.zeros(nbytes, np.uint8) if out is None else out(nbytes)
    if not rows:
        return _given(rows, nbytes, page_size, made)
    flat = flat_array(made, what="out")
    if flat.nbytes != nbytes:
        raise WireError(f"the sender announces {nbytes} bytes; out has {flat.nbytes}")
    arrays = arrays_of(rows, flat, "the sender")
    return arrays, Space(arrays, page_size, writable=True)


def _given(rows: tuple[Row, ...], nbytes: int, page_size: int, out: Memory | Mapping[str, Memory]) -> tuple[Any, Space]:
    """Return the caller's own memory as the page space that is announced."""
    space = Space(out, page_size, writable=True)
    if space.named != bool(rows):
        raise WireError(f"the sender sends {'arrays by name' if rows else 'one buffer'}; out is the other")
    if rows:
        names = [row[0] for row in rows]
        there: Any = out
        if set(names) != set(there):
            raise WireError(f"the sender sends the arrays {names[:10]}; out has {list(there)[:10]}")
        space = Space({name: there[name] for name in names}, page_size, writable=True)
    for region, length in zip(space.regions, [row[5] for row in rows] or [nbytes], strict=True):
        if region.nbytes != length:
            what = f"out[{region.name!r}]" if rows else "out"
            raise WireError(f"the sender announces {length} bytes; {what} has {region.nbytes}")
    return out, space
