"""The exceptions dirtylog raises: the ground floor, imports nothing of the package."""

from __future__ import annotations

__all__ = ["BackendUnavailable", "DirtyLogError", "IncompleteLogWarning"]


class DirtyLogError(Exception):
    """Base of every error that is dirtylog's own.

    Failures that the kernel would report are plain `OSError` with the kernel's
    errno; wrong arguments are `TypeError`, `ValueError` and `IndexError`.
    """

    __module__ = "dirtylog"


class BackendUnavailable(DirtyLogError):
    """A facility this machine does not offer.

    Parameters
    ----------
    facility : str
        What was asked for, for example ``"userfaultfd"``.
    probed : str
        What was tried and what it answered, for example
        ``"ioctl(UFFDIO_API): EINVAL"``.
    instead : str, optional
        The way out.
    """

    __module__ = "dirtylog"

    def __init__(self, facility: str, probed: str, instead: str = "") -> None:
        self.facility = facility
        self.probed = probed
        self.instead = instead
        message = f"{facility} is not available here: {probed}"
        super().__init__(f"{message}; {instead}" if instead else message)

    def __reduce__(self) -> tuple[type[BackendUnavailable], tuple[str, str, str]]:
        """Pickle by the three parts, not by the joined message."""
        return type(self), (self.facility, self.probed, self.instead)


class IncompleteLogWarning(UserWarning):
    """A source lost track and reported every page instead (I6)."""

    __module__ = "dirtylog"
