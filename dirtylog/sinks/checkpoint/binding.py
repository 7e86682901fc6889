"""Notices that the array which a checkpoint was given is not what is written to any more.

``w = w + 1`` makes a new array; the checkpoint still holds the old one and would save it for ever. References are
counted, so it is noticed where they are: for NumPy arrays whose memory is their own, another array's, or a mapping.

``p.data = other`` of a PyTorch tensor, a write to a pandas Series that has a copy, or ``w.resize(n, refcheck=False)``
leave the object and move its memory, of which the tracker sees nothing: then it lies elsewhere.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dirtylog._bits.flat import flat_array

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["Binding", "place_of"]


def place_of(memory: Memory, what: str) -> tuple[int, int]:
    """Return where memory lies now: its address, and how many bytes there are."""
    flat = flat_array(memory, what=what, empty=True)
    return flat.ctypes.data, flat.nbytes


def _references(arrays: Mapping[Any, Any], name: Any) -> int:
    """Count the references to a value; the call's own is always one more of the same kind."""
    return sys.getrefcount(arrays[name])


class Binding:
    """How many references to an array are its checkpoint's own.

    Parameters
    ----------
    arrays : mapping
        Where the array is, before the checkpoint keeps any reference to it.
    name : str
        Its name there.
    """

    __slots__ = ("_name", "_own")

    def __init__(self, arrays: Mapping[str, Any], name: str) -> None:
        self._name = name
        # Where threads run in parallel, references are not counted in one place.
        counted = getattr(sys, "_is_gil_enabled", lambda: True)()
        self._own = -_references(arrays, name) if counted and isinstance(arrays[name], np.ndarray) else None

    def settle(self, arrays: Mapping[str, Any]) -> None:
        """Take the references that came since as the checkpoint's own."""
        if self._own is not None:
            self._own += _references(arrays, self._name)

    def lost(self, arrays: Mapping[str, Any]) -> bool:
        """Say whether nobody but the checkpoint can reach the array or its memory."""
        # What is counted of a value that only one thing refers to, less that one.
        of_the_call = _references({"": object()}, "") - 1
        if self._own is None or _references(arrays, self._name) > self._own + of_the_call:
            return False
        array = arrays[self._name]
        while isinstance(array, np.ndarray) and array.base is not None:
            # One reference is the view's.
            if not isinstance(array.base, np.ndarray | mmap.mmap) or sys.getrefcount(array.base) > 1 + of_the_call:
                return False
            array = array.base
        return True
