"""Who may run: what each end of a migration knows of it, kept for whoever asks later.

Each end records its stage before the word that depends on it is sent: the source that it gave the right away before
RUN, the copy that it has everything before HAVE and that it has the right before DONE. In this process that is a
dictionary; in a journal, a directory, it is a file for each end of each session, durable before the call returns.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from dirtylog.errors import DirtyLogError
from dirtylog.sinks._bytes.pageio import sync_directory
from dirtylog.sinks.migrate.wire import WireError

__all__ = ["Record", "Status", "check_no_copy", "check_unused", "new_session", "status"]

End: TypeAlias = Literal["source", "copy"]
_PATTERN = re.compile("[0-9a-f]{32}")
_KEPT = 1024

# Stage -> (may this end run: yes, no, or only on the other end's word; what to do).
_STAGES: dict[tuple[str, str], tuple[bool | None, str]] = {
    ("source", "live"): (True, "the source has the right to run; the copy is not complete, or was not told to run"),
    ("source", "given"): (None, "the right to run was given away and no answer came: settle(), or ask the copy's end"),
    ("source", "serves"): (
        False,
        "the copy runs and lacks pages that only the source has: it must neither run nor end before the copy has them, "
        "or is gone because it never ran",
    ),
    ("source", "done"): (False, "the copy has taken the right to run"),
    ("copy", "part"): (False, "the copy is not complete"),
    ("copy", "have"): (None, "the copy is complete and was not told to run: settle(), or ask the source's end"),
    ("copy", "ready"): (False, "the copy lacks pages and was not told to run"),
    ("copy", "faults"): (True, "the copy runs, and lacks pages that only the source has: keep both ends"),
    ("copy", "fills"): (
        False,
        "the copy runs when it has everything, and lacks pages that only the source has: keep both ends; if this one's "
        "receive has ended, nothing ran here, and the source may go on",
    ),
    ("copy", "gone"): (False, "the copy was given up before it ran; the source has the right"),
    ("copy", "runs"): (True, "the copy has the right to run"),
}


@dataclass(frozen=True, slots=True)
class Status:
    """What one end knows of a migration.

    Attributes
    ----------
    session : str
        32 hexadecimal digits.
    end : str
        "source" or "copy": whose view it is.
    stage : str
        Of a source: live, given, serves, done. Of a copy: part, have, ready, gone, fills, faults, runs.
    """

    session: str
    end: End
    stage: str

    @property
    def may_run(self) -> bool | None:
        """Whether this end may run; None where only the other end's stage, or you, can say."""
        return _STAGES[self.end, self.stage][0]

    @property
    def advice(self) -> str:
        """What that means, in a line."""
        return _STAGES[self.end, self.stage][1]


_known: dict[tuple[str, str], Status] = {}
_lock = threading.RLock()


def new_session() -> str:
    """Return an identifier that nobody can guess."""
    return secrets.token_hex(16)


def _check(session: str) -> str:
    """Refuse what is no identifier of a session: it becomes part of a file's name."""
    if not isinstance(session, str) or not _PATTERN.fullmatch(session):
        raise ValueError(f"session is {session!r}; it must be 32 hexadecimal digits")
    return session


def check_unused(session: str, journal: str | os.PathLike[str] | None) -> str:
    """Refuse what is no identifier, and one that a source has had: its copy may be waiting for the right to run."""
    _check(session)
    if _recorded(session, "source", journal):
        raise ValueError(f"session {session} was used before; each migration has one of its own: leave it out")
    return session


def check_no_copy(session: str, journal: str | os.PathLike[str] | None) -> None:
    """Refuse a session of which this end has a complete copy: its stage is what keeps two ends from running.

    Raises
    ------
    WireError
        There is one, in this process or in the journal.
    DirtyLogError
        The journal's file is damaged.
    """
    recorded = _recorded(session, "copy", journal)
    if recorded is not None and recorded.stage in ("have", "ready", "fills", "faults", "runs"):
        raise WireError(
            f"session {session} was received here before: {recorded.advice}. A new migration has a session of its own"
        )


def _recorded(session: str, end: End, journal: str | os.PathLike[str] | None) -> Status | None:
    """Return what this end has recorded of a session, in this process or in its journal."""
    known = _known.get((session, end))
    if known is None and journal is not None:
        known = _read(_path(journal, session, end), session)
    return known


def _path(journal: str | os.PathLike[str], session: str, end: str) -> str:
    return os.path.join(os.fspath(journal), f"{session}.{end}.json")


class Record:
    """One end's stage of one session, in memory and where there is a journal on the disk."""

    def __init__(self, session: str, end: End, journal: str | os.PathLike[str] | None) -> None:
        self.session: str = session
        self.end: End = end
        self.journal: str | os.PathLike[str] | None = journal
        self.stage: str = ""

    def set(self, stage: str) -> None:
        """Record a stage; when this returns it is durable."""
        # First in memory: whatever interrupts the rest, nobody in this process believes the stage before.
        self.stage = stage
        each = Status(self.session, self.end, stage)
        with _lock:
            _known[self.session, self.end] = each
            while len(_known) > _KEPT:
                del _known[next(iter(_known))]
        if self.journal is not None:
            _write(_path(self.journal, self.session, self.end), json.dumps(asdict(each)).encode())


def _write(path: str, data: bytes) -> None:
    """Replace a small file, durably: the old content or the new one is there, whatever happens."""
    part = f"{path}.{secrets.token_hex(4)}.part"
    try:
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.unlink(part)
        raise
    sync_directory(os.path.dirname(path))


def status(session: str, *, end: End | None = None, journal: str | os.PathLike[str] | None = None) -> Status:
    """Say how far a migration has come, as one end knows it.

    Parameters
    ----------
    session : str
        Its identifier: of a :class:`Result`, a :class:`MigrationError`, or the name of a file in the journal.
    end : str, optional
        "source" or "copy", where both ends are in this process or share a journal.
    journal : path, optional
        The directory that `send` or `receive` was given. Without it, what this process remembers of its last
        thousand.

    Returns
    -------
    Status
        `may_run` says whether this end may run, `advice` what to do.

    Raises
    ------
    KeyError
        Nothing is known of it. A source of which nothing is known has not given its right away.
    ValueError
        `session` is not an identifier.
    DirtyLogError
        A file of the journal is damaged.

    Notes
    -----
    Thread-safe, and allowed while the migration runs.
    """
    _check(session)
    for each in ("source", "copy") if end is None else (end,):
        found = _known.get((session, each)) if journal is None else _read(_path(journal, session, each), session)
        if found is not None:
            return found
    where = "this process" if journal is None else f"the journal {os.fspath(journal)!r}"
    raise KeyError(f"{where} knows nothing of session {session}")


def _read(path: str, session: str) -> Status | None:
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(4096))
        if found["session"] != session or (found["end"], found["stage"]) not in _STAGES:
            raise ValueError("it speaks of something else")
        return Status(session, found["end"], found["stage"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DirtyLogError(f"{path} is damaged ({error}): ask the other end") from error
