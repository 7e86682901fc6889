"""The destination of a migration: takes frames from a socket, trusts none of them, and fills memory.

The copy may run when the source has given it the right to, and never before: see `sender.py`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from dirtylog.sinks.migrate.control import Control
from dirtylog.sinks.migrate.destination import Copy, When
from dirtylog.sinks.migrate.failing import fail
from dirtylog.sinks.migrate.wire import Channel
from dirtylog.sinks.snapshot.space import Space

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["receive"]


def receive(
    sock: socket.socket,
    *,
    out: Memory | Mapping[str, Memory] | Callable[[int], Memory] | None = None,
    limit: int = 1 << 36,
    state: Callable[[Any], object] | None = None,
    arrived: Callable[[Any], object] | None = None,
    start: Callable[[Any], object] | None = None,
    max_rounds: int = 1000,
    deadline: float | None = None,
    reconnect: Callable[[int], socket.socket] | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
    another: Callable[[], socket.socket] | None = None,
    postcopy: bool = False,
    run: Literal["at-once", "filled"] = "at-once",
    control: Control | None = None,
) -> Any:
    """Receive the memory that :func:`send` sends from the other end.

    Parameters
    ----------
    sock : socket.socket
        Connected stream socket, best from :meth:`Listener.accept`; give it a timeout if the peer may hang: it bounds
        each frame as a whole, and how long the line may be silent. It stays open and yours.
    out : buffer, mapping of str to buffer, or callable, optional
        Writable contiguous memory of exactly the source's size: for arrays by name, one for each. Or what makes it:
        called with the size of all in bytes before the first page is sent, so that a file of that size can be
        reserved. By default new arrays; of memory without names one of uint8.
    limit : int
        Refuse memory of more bytes than this (64 GiB), unless `out` is a buffer.
    state : callable, optional
        Called with the state that the sender has sent beside the memory, or None, when all of both is there and before
        `arrived`: registers, say, to be set before the copy runs. What it raises is as of `arrived`.
    arrived : callable, optional
        Called with the memory when all of it is there and checked, before the sender hears so. Make it durable here:
        what this raises tells the sender that the migration failed, and the source goes on. The copy may not run yet.
    start : callable, optional
        Called with the memory when the source has given the copy the right to run, before the sender hears that it was
        taken. What it raises is raised at the end, with a note: the copy has the right all the same.
    max_rounds : int
        Refuse more rounds than this.
    deadline : float, optional
        Give up when the whole migration takes more seconds than this; with postcopy, up to the switch.
    reconnect : callable, optional
        Called when the line breaks, with how many times it has; returns the socket of the sender that came again,
        which is closed for you, or raises what ends the migration:
        ``lambda breaks: listener.accept(60, control=control)``.
    journal : path, optional
        A directory in which :func:`status` finds who may run even if this process is killed.
    progress : callable, optional
        Called with the round's number and the bytes of pages received so far, every few MiB.
    another : callable, optional
        Lets a sender come with several channels: returns one more socket of its, which is closed for you:
        ``lambda: listener.accept(60, control=control)``. Each is filled by a thread of its own.
    postcopy : bool
        Let a sender with `postcopy` start the copy before it has everything: `start` is called at once, and threads
        that touch what is lacking wait for it. `out` must be private anonymous memory that begins with a page of the
        system's, as :func:`dirtylog.zeros` makes it; by default it is. `sock` must be plain: TLS by this interpreter
        needs the GIL that a thread may hold while it waits for a page. :class:`ListenerProcess` does TLS in a process
        of its own, and hands out plain sockets.
    run : {"at-once", "filled"}
        When `start` is called with postcopy. ``"filled"``: when nothing is lacking any more, for programs whose system
        calls would meet what is (see Notes). Nobody may use the memory before. If the line is lost for good the copy
        is given up, and the source may go on.
    control : Control, optional
        Says how far it is, and cancels it as long as the copy is not complete, from any thread. Its bandwidth is the
        sender's matter.

    Returns
    -------
    buffer, or dict of str to array
        `out`, or what is new: the source's memory as it was when it was paused. The copy has the right to run.

    Raises
    ------
    MigrationError
        The connection ended before the end, the sender gave up, or anything it sent was not right. What `out` holds
        then is of no use, unless the error is ``uncertain``: then all of it is there, and the source had not said that
        it may run. Ask there, or :func:`settle`, before you let the copy run.
    Exception
        What a callable raises; the sender is told.

    Notes
    -----
    Nothing that arrives is trusted: frames, tables and compressed data are bounded and checked before they are used,
    a round brings each page once at most and only the last may be empty, and every page must have come before the end
    is believed. Allocates the memory and a few MiB, and with a state of the largest size some 64 MiB more; memory whose
    pages are zero is not committed. CRC-32 finds accidents; for a line that somebody may listen to or change use TLS:
    :class:`Listener` with :class:`Keys`.

    With postcopy `start` is called in this thread, and should only begin what uses the memory. System calls on what is
    lacking answer EFAULT where this process may not have a userfaultfd for the kernel's own faults: without
    CAP_SYS_PTRACE, unless ``vm.unprivileged_userfaultfd`` is 1. Make such calls when `receive`
    has returned, or let the program run then: ``run="filled"``. A child of a fork has none of the memory until then. A
    line is replaced by the interpreter: a thread that holds the GIL while it waits for a page, as access to one element
    of an array does, keeps `reconnect` from being called. :func:`dirtylog.track` takes mprotect while the memory fills,
    and does not report what is filled; afterwards open another one for userfaultfd, and then close the first.
    """
    if max_rounds < 1:
        raise ValueError(f"max_rounds is {max_rounds}; it must be 1 or more")
    if run not in get_args(When):
        raise ValueError(f"run is {run!r}; it must be 'at-once' or 'filled'")
    channel = Channel(sock, deadline)
    if out is not None and not callable(out):
        # Refused before anything is said.
        Space(out, 4096, writable=True)
    control = control or Control()
    copy = Copy(channel, out, limit, max_rounds, state, arrived, start, progress, reconnect, journal, another, control)
    copy.postcopy, copy.when = postcopy, run
    try:
        copy.run()
    except BaseException as error:
        fail(copy, error)
    finally:
        copy.close()
        control._off()
    problem, copy.problem = copy.problem, None
    if problem is not None:
        problem.add_note(f"the copy has the right to run, and the source has not; session {copy.session}")
        try:
            raise problem
        finally:
            # As in `fail`.
            del problem
    return copy.result
