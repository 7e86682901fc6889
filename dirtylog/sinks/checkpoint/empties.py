"""Notes the arrays of a checkpoint that have no items: of them there is no memory to track, only a type and a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dirtylog._bits.flat import array_of
from dirtylog.sinks.snapshot import SnapshotError
from dirtylog.sinks.snapshot.space import dtype_of

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["A_BYTE", "check_names", "described", "noted", "rows", "split", "without_items", "woven"]

# What stands for memory where there is none.
A_BYTE = bytes(1)
# The place of an array without items among all, its name, its type as in a `.npy`, and its shape.
Row = tuple[int, str, Any, tuple[int, ...]]


def without_items(arrays: Mapping[str, Memory]) -> frozenset[str]:
    """Return the names of the arrays that have no items."""
    return frozenset(name for name, memory in arrays.items() if array_of(memory, f"memory {name!r}").size == 0)


def _plain(kind: Any) -> Any:
    """As JSON gives it back."""
    return [_plain(each) for each in kind] if isinstance(kind, list | tuple) else kind


def noted(arrays: Mapping[str, Memory], names: frozenset[str]) -> list[list[Any]]:
    """Return what a checkpoint notes of arrays without items.

    Raises
    ------
    ValueError
        One of these has items now.
    """
    found: list[list[Any]] = []
    for place, (name, memory) in enumerate(arrays.items()):
        if name not in names:
            continue
        array = array_of(memory, f"memory {name!r}")
        if array.size:
            # Its writes were not tracked: a checkpoint without them would be silent about it (I6).
            raise ValueError(
                f"the array {name!r} was empty and has grown; tell the checkpoint: update({{{name!r}: {name}}})"
            )
        found.append([place, name, _plain(np.lib.format.dtype_to_descr(array.dtype)), [*array.shape]])
    return found


def rows(note: object, where: str) -> list[Row]:
    """Return what :func:`noted` made, in order of place.

    Raises
    ------
    SnapshotError
        It is something else.
    """
    found: list[Row] = []
    for row in note if isinstance(note, list) else [note]:
        if not (
            isinstance(row, list)
            and len(row) == 4
            and type(row[0]) is int
            and isinstance(row[1], str)
            and isinstance(row[3], list)
            and len(row[3]) <= 64
            and all(type(extent) is int and 0 <= extent < 1 << 63 for extent in row[3])
            and 0 in row[3]
        ):
            raise SnapshotError(f"{where}: what is noted of its empty arrays cannot be used")
        found.append((row[0], row[1], row[2], tuple(row[3])))
    return sorted(found, key=lambda row: row[0])


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a name that no array has.

    Raises
    ------
    KeyError
        There is none.
    """
    for name in names:
        if name not in known:
            raise KeyError(f"the checkpoint has no array {name!r}; it has {', '.join(sorted(known)[:20])}")


def _made(row: Row, where: str) -> Any:
    _, name, kind, shape = row
    dtype = dtype_of(kind, where)
    try:
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        return np.empty(shape, dtype)
    except ValueError as error:
        raise SnapshotError(f"{where}: the array {name!r} cannot be used: {error}") from None


def woven(found: Mapping[str, Any], note: object, where: str) -> dict[str, Any]:
    """Put arrays without items among the others, each at its place."""
    items = list(found.items())
    for row in rows(note, where):
        items.insert(row[0], (row[1], _made(row, where)))
    return dict(items)


def described(
    found: Sequence[tuple[str, str, list[int], int]], note: object, where: str
) -> list[tuple[str, str, list[int], int]]:
    """Put name, type, shape and bytes of arrays without items among those of the others."""
    items = list(found)
    for row in rows(note, where):
        items.insert(row[0], (row[1], str(dtype_of(row[2], where)), list(row[3]), 0))
    return items


def split(into: Mapping[str, Memory], note: object, where: str) -> dict[str, Memory]:
    """Return those of some arrays to fill that have memory; the others are there, and as they were saved.

    Raises
    ------
    ValueError
        One of the others is missing, or of another shape.
    """
    shapes = {name: shape for _, name, _, shape in rows(note, where)}
    for name, shape in shapes.items():
        if name not in into or array_of(into[name], f"into[{name!r}]").shape != shape:
            raise ValueError(f"into has no array {name!r} of shape {shape}, which the checkpoint has")
    return {name: memory for name, memory in into.items() if name not in shapes}
