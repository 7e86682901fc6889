"""What becomes of a copy whose migration fails: it runs, it waits for pages, somebody has to ask, or it never runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtylog.errors import BackendUnavailable
from dirtylog.sinks.migrate.control import Cancelled
from dirtylog.sinks.migrate.destination import Stage
from dirtylog.sinks.migrate.policy import MigrationError
from dirtylog.sinks.migrate.wire import Refusal, WireError

if TYPE_CHECKING:
    from dirtylog.sinks.migrate.destination import Copy

__all__ = ["fail"]


def fail(copy: Copy, error: BaseException) -> None:
    """End as what there is demands; raises what the caller is told, or returns where the copy may run."""
    told = _told(copy, error)
    if told is None:
        return
    try:
        if told is error:
            raise told
        raise told from error
    finally:
        # The traceback of what is raised leads here: each would keep the other, and the memory.
        del told, error


def _told(copy: Copy, error: BaseException) -> BaseException | None:
    """End as what there is demands; return what the caller is told, None where the copy may run."""
    expected = isinstance(error, (OSError, WireError))
    if copy.stage == Stage.FAULTS:
        told = _told_of_faults(copy, error, expected)
        if told is not None:
            return told
    if copy.faults is not None and copy.stage != Stage.RUNS:
        copy.faults.release()
    if copy.stage == Stage.RUNS:
        if expected:
            # Only the answer may be lost; nothing turns this into a failure.
            return None
        error.add_note(f"the copy has the right to run, and the source has not; session {copy.session}")
        return error
    if copy.stage == Stage.HAVE and copy.channel.broken and expected and copy.faults is None:
        return MigrationError(
            f"the copy is complete and was not told to run before the line broke: settle session {copy.session}, "
            f"or ask the source's end ({error})",
            uncertain=True,
            session=copy.session,
        )
    try:
        # Before the sender hears so: it takes the right back on this word.
        copy.move(Stage.GONE)
    finally:
        if not isinstance(error, Refusal):
            plainly = expected or isinstance(error, (BackendUnavailable, Cancelled))
            copy.channel.refuse(str(error) if plainly else _summary(error))
    if isinstance(error, Cancelled):
        number = copy.filling.number if copy.filling else 0
        return MigrationError(f"the migration was cancelled in round {number}", session=copy.session)
    if not expected:
        if copy.session:
            error.add_note(f"the copy was given up before it was told to run, and must not; session {copy.session}")
        return error
    number = copy.filling.number if copy.filling else 0
    return MigrationError(f"migration failed in round {number}: {error}", session=copy.session)


def _told_of_faults(copy: Copy, error: BaseException, expected: bool) -> BaseException | None:
    """End a copy that has the right to run and may lack pages; return what the caller is told, None where it runs."""
    assert copy.faults is not None
    # Before its line is closed. What is lacking stays guarded: it never reads as zeros.
    copy.faults.stop()
    if not copy.faults.left:
        # The source has heard so, or will: nothing turns this into a failure.
        copy.faults.release()
        try:
            copy.move(Stage.RUNS)
        except Exception as problem:
            error.add_note(f"the journal could not be written ({type(problem).__name__}: {problem})")
        if expected:
            copy.begin()
        return None
    if not copy.started:
        # Nothing has run here, and the source may go on; it did not hear of the right, or asks.
        return _give_up(copy, error, expected)
    lost = f"the copy runs, and waits where it lacks {copy.faults.left} pages; session {copy.session}"
    if expected:
        return MigrationError(f"{lost}: the line to the source broke ({error})", session=copy.session)
    error.add_note(lost)
    return error


def _give_up(copy: Copy, error: BaseException, expected: bool) -> BaseException:
    """Say that a copy that has the right to run and did not begin never will; return what the caller is told."""
    assert copy.faults is not None
    left = copy.faults.left
    # Durable before anybody is told: whoever reads it lets the source go on.
    try:
        copy.move(Stage.GONE)
    finally:
        # Nobody has seen the memory, and nobody waits for it where the journal cannot be written.
        copy.faults.release()
    lost = f"the copy was given up before it ran, lacking {left} pages: the source may go on; session {copy.session}"
    if expected:
        return MigrationError(f"{lost}: the line to the source broke ({error})", session=copy.session)
    error.add_note(lost)
    return error


def _summary(error: BaseException) -> str:
    """Say in a line what ended the receiver, for a peer that has no traceback."""
    return f"the receiver failed ({type(error).__name__}: {error})"
