"""The manners of whoever owns a descriptor, a mapping or a handler: closed once, and never forgotten in silence."""

from __future__ import annotations

import sys
import warnings
from types import TracebackType
from typing import NoReturn, Self, SupportsIndex

from dirtylog.sources._backing import births, forks

__all__ = ["Resource", "has_forked"]


def has_forked() -> bool:
    """Whether this process has forked, or is the child of a fork, since this module was imported."""
    return bool(forks() or births())


class Resource:
    """Base of sources that hold something the system must get back.

    A subclass sets `_closed` to False when its construction has succeeded, and
    gives back what it holds in `_release`, which is called once.
    """

    _closed = True
    # Of the class: see `__del__`.
    _ending = staticmethod(sys.is_finalizing)

    def __init__(self) -> None:
        """Remember the process that the resource belongs to."""
        self._to_release = [True]
        self._forks_at_start = forks()
        self._births_at_start = births()

    def _release(self) -> None:
        raise NotImplementedError

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the {type(self).__name__} is closed; open another one")

    @property
    def _inherited(self) -> bool:
        """Whether it was made by the process that this one was forked from."""
        return self._births_at_start != births()

    @property
    def _forked_since(self) -> bool:
        """Whether this process, or its parent, has forked since."""
        return self._forks_at_start != forks()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """Give everything back; a second call does nothing, and does not wait for the first."""
        if self._closed:
            return
        self._closed = True
        # One of several closers gets it: the second would close a number that is somebody else's by now.
        try:
            self._to_release.pop()
        except IndexError:
            return
        self._release()

    def __enter__(self) -> Self:
        """Return the object itself.

        Raises
        ------
        ValueError
            It is closed.
        """
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> NoReturn:
        """Refuse to be copied or pickled: a second owner would give back what is in use, or somebody else's by then.

        Raises
        ------
        TypeError
            Always.
        """
        raise TypeError(
            f"a {type(self).__name__} is neither copied nor pickled: it owns what it closes; open another one there"
        )

    def __del__(self) -> None:
        """Close what was forgotten, and say so; a forked child's copy goes in silence."""
        if self._closed:
            return
        try:
            try:
                if not self._inherited:
                    warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            finally:
                self.close()
        except (AttributeError, TypeError):
            # When the interpreter ends, the names of modules may be None before the last object goes (without the GIL
            # they are). The system takes everything back then.
            if not self._ending():
                raise
