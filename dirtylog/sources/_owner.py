"""Who owns a descriptor or a mapping closes it once, and says so when it was forgotten."""

import warnings
from types import TracebackType
from typing import Self

__all__ = ["Owner"]


class Owner:
    """Base of the context managers that own kernel resources.

    A subclass implements `close`, idempotent, and `closed`.
    """

    __slots__ = ("__weakref__",)

    @property
    def inherited(self) -> bool:
        """Whether it was made by the process that this one was forked from."""
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        raise NotImplementedError

    def close(self) -> None:
        """Give everything back; the second time does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Return self; ValueError once closed."""
        if self.closed:
            raise ValueError(f"{self!r} cannot be entered again; open a new one")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Close what was forgotten, with a ResourceWarning; a forked child's copy goes in silence."""
        # An object whose constructor failed has nothing to close and no name to warn by.
        try:
            forgotten = not self.closed
        except AttributeError:
            return
        if not forgotten:
            return
        try:
            if not self.inherited:
                message = f"unclosed {self!r}; use it as a context manager"
                warnings.warn(message, ResourceWarning, source=self, stacklevel=2)
        finally:
            self.close()
