"""Ask the other end who may run, after a migration whose last words were lost."""

from __future__ import annotations

import os
import socket

from dirtylog.sinks.migrate.payloads import COMPLETE, FAULTS, HELLO, READY, RUNS
from dirtylog.sinks.migrate.policy import MigrationError
from dirtylog.sinks.migrate.sessions import Record, Status, status
from dirtylog.sinks.migrate.wire import Channel, Kind, WireError

__all__ = ["settle"]


def settle(
    sock: socket.socket,
    session: str,
    *,
    journal: str | os.PathLike[str] | None = None,
    deadline: float | None = None,
) -> Status:
    """Meet the other end of a session again, so that exactly one of the two may run.

    Each end calls this, or the other one is still in `receive` with `reconnect`. A source that has given its right away
    gives it again; a copy that is complete and was not told to run is told now, if the source has given the right away.

    Parameters
    ----------
    sock : socket.socket
        Connected to the other end: :func:`connect` on the source's side, :meth:`Listener.accept` on the copy's.
    session : str
        Which migration.
    journal : path, optional
        The directory that `send` or `receive` was given; otherwise what this process remembers.
    deadline : float, optional
        Give up after so many seconds.

    Returns
    -------
    Status
        What this end knows now. `may_run` is True or False: no longer None.

    Raises
    ------
    MigrationError
        The other end could not be asked, or does not know either; ``uncertain``, and nothing has changed.
    KeyError, ValueError, DirtyLogError
        As :func:`status`.

    Notes
    -----
    A source that has its right, or is rid of it, asks nobody: what it knows is returned. So it is for a copy that is
    not complete, was given up, or runs.
    """
    known = status(session, journal=journal)
    if known.may_run is not None:
        return known
    record = Record(session, known.end, journal)
    channel = Channel(sock, deadline)
    try:
        (_as_source if known.end == "source" else _as_copy)(channel, session, record)
    except (OSError, WireError) as error:
        raise MigrationError(f"session {session} is not settled: {error}", uncertain=True, session=session) from error
    return Status(session, known.end, record.stage)


def _as_source(channel: Channel, session: str, record: Record) -> None:
    raw = bytes.fromhex(session)
    # No memory: this comes for the right alone.
    channel.send(Kind.HELLO, HELLO.pack(raw, 0, 0, 0, 0, 0, 0))
    _, answer = channel.receive(Kind.READY, counted=False)
    stage = READY.unpack(answer)[0] if answer.nbytes == READY.size else None
    if stage not in (COMPLETE, FAULTS, RUNS):
        raise WireError("the other end does not hold a complete copy: another receiver may answer there")
    if stage == COMPLETE:
        channel.send(Kind.RUN, raw)
    _, answer = channel.receive(Kind.DONE, counted=False)
    if answer != raw:
        raise WireError("the copy answers for another session")
    # What lacks pages has the right, and the pages are not here to be given.
    record.set("serves" if stage == FAULTS else "done")


def _as_copy(channel: Channel, session: str, record: Record) -> None:
    raw = bytes.fromhex(session)
    _, payload = channel.receive(Kind.HELLO)
    if payload.nbytes != HELLO.size or bytes(payload[:16]) != raw:
        channel.refuse("another session is being settled here")
        raise WireError("a sender of another session came")
    channel.send(Kind.READY, READY.pack(COMPLETE, 0, 0, bytes(16)), counted=False)
    _, payload = channel.receive(Kind.RUN, counted=False)
    if bytes(payload) != raw:
        raise WireError("the right to run is for another session")
    record.set("runs")
    try:
        channel.send(Kind.DONE, raw, counted=False)
    except OSError:
        # The right is here all the same; the source may ask again.
        return
