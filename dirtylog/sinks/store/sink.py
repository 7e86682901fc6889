"""Commits the epochs of one observer as snapshots of an Icechunk repository: all of an epoch, once, or nothing."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

from dirtylog.log import Observer
from dirtylog.sinks.snapshot.footer import encode_state
from dirtylog.sinks.store.branch import BranchMoved, InDoubt, Version, history, icechunk_package, restore, since
from dirtylog.sinks.store.participant import Participant
from dirtylog.sinks.store.parts import Chunking, Written
from dirtylog.sinks.store.zarrs import ATTRIBUTE, note

if TYPE_CHECKING:
    from dirtylog._typing import Memory
    from dirtylog.sinks.snapshot.chain import Progress

__all__ = ["Saved", "StoreSink", "commit_once"]

# What is noted of every commit, here or by a fleet.
NOTED = {"transaction", "observer", "epoch", "step", "pages", "exact", "chunks", "bytes", "arrays", "shards"}


@dataclass(frozen=True, slots=True)
class Saved:
    """What one epoch became.

    Attributes
    ----------
    snapshot : str
        Icechunk's name of it: what :func:`restore` takes.
    written : bool
        Whether there was anything to write; if not, it is the snapshot before.
    epoch : int
        The epoch's number.
    pages : int
        Dirty pages.
    exact : bool
        Whether just those were written, as far as the sources know.
    chunks, nbytes : int
        What was written: chunks, and bytes before compression.
    whole : tuple of str
        Arrays that were written whole: they were new, or their dirt was in so many chunks that it costs less.
    amplification : float
        Bytes written for each dirty byte: 1 at best; chunks that are too large make it large.
    adopted : bool
        Whether the answer to the commit was lost, and the store itself said that it is there.
    """

    snapshot: str
    written: bool
    epoch: int
    pages: int
    exact: bool
    chunks: int
    nbytes: int
    whole: tuple[str, ...]
    amplification: float
    adopted: bool

    @classmethod
    def of(cls, written: Written, snapshot: str, adopted: bool = False) -> Self:
        """Make it of what was written, the snapshot that this became, and whether its answer was lost."""
        return cls(
            snapshot=snapshot,
            written=bool(written.chunks),
            epoch=written.epoch,
            pages=written.pages,
            exact=written.exact,
            chunks=written.chunks,
            nbytes=written.nbytes,
            whole=written.whole,
            amplification=written.nbytes / written.dirty_bytes if written.dirty_bytes else 0.0,
            adopted=adopted,
        )


def commit_once(repo: Any, branch: str, session: Any, message: str, about: Mapping[str, Any]) -> tuple[str, bool]:
    """Commit a session, and where the answer is not plain, ask the store whether it is there.

    Parameters
    ----------
    repo : icechunk.Repository
        Whose session it is.
    branch : str
        Where it goes.
    session : icechunk.Session
        What was written.
    message : str
        Of the commit.
    about : mapping
        What is noted of it; ``about["transaction"]`` is its name.

    Returns
    -------
    snapshot : str
        Its name.
    adopted : bool
        Whether its answer was lost, and it is there all the same.

    Raises
    ------
    BranchMoved
        Somebody else was faster; nothing is committed.
    InDoubt
        The answer was lost, and the store gives none.
    Exception
        What the store raised; nothing is committed.
    """
    base = session.snapshot_id
    try:
        return session.commit(message, metadata={ATTRIBUTE: dict(about)}), False
    except Exception as error:
        try:
            later = since(repo, branch, base)
        except BranchMoved:
            raise
        except Exception as silent:
            raise InDoubt(
                f"transaction {about['transaction']} was sent to {branch!r}, the answer is {_said(error)}, and the "
                f"store does not say whether it is there ({_said(silent)}); its pages are kept, and the next save asks "
                "again"
            ) from error
        for version in later:
            if version.transaction == about["transaction"]:
                return version.snapshot, True
        if isinstance(error, icechunk_package().ConflictError) and later:
            raise BranchMoved(
                f"{branch!r} is at {later[0].snapshot} and not at {base} any more: somebody else has committed. "
                "Restore from the branch, or save to another one"
            ) from error
        raise


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


class StoreSink:
    """Saves the epochs of an observer in an Icechunk repository, one snapshot each.

    Parameters
    ----------
    observer : Observer
        Of the log that sees what is written to the arrays. Nobody else collects from it.
    arrays : mapping of str to array
        By the names that they are to have in the store. Write to them in place.
    repo : icechunk.Repository
        Where; see :func:`repository`.
    branch : str, default "main"
        Of the repository; it must be there.
    base : str, optional
        The snapshot that the arrays hold, because they were restored from it. The first save then writes only what has
        been written since the observer was made. Without it the first save writes everything.
    chunks : sequence of int, or mapping of str to sequence of int, optional
        The shape of a chunk. By default 256 KiB to 1 MiB whose bytes lie together; see :func:`advise_chunks`.
    places : mapping of str to int, optional
        At which byte of the log's page space each array begins: ``first_page * page_size`` where its tracker is
        attached at `first_page`. By default each begins on a page of its own, one after the other, in the order given.
    memory : buffer, optional
        What the page space is, where the arrays are views of one block: ``arena.block``, say.
    compressors : object
        As for ``zarr.create_array``: Zstandard by default, None for none.

    Raises
    ------
    BackendUnavailable
        The package icechunk or zarr is not installed.
    ValueError
        The arrays do not fit the log's page space, or cannot be stored.

    Notes
    -----
    Thread-safe; saves come one after the other. Nothing that breaks between a save's first request and its last loses
    or repeats an epoch: until the branch is moved to the new snapshot, which is one conditional write, nobody sees any
    of it, and the pages are dirty still.

    Examples
    --------
    >>> import numpy as np, dirtylog as dl
    >>> from dirtylog.sinks.store import StoreSink, repository
    >>> w = dl.zeros((1024, 512))
    >>> log = dl.DirtyLog()
    >>> with dl.track(w) as tracker:  # doctest: +SKIP
    ...     _ = log.attach(tracker)
    ...     sink = StoreSink(log.observer("store"), {"w": w}, repository("memory://"))
    ...     first = sink.save()
    ...     w[7] = 1
    ...     second = sink.save()
    ...     second.chunks, sink.restore(first.snapshot)["w"][7].max(), sink.restore()["w"][7].max()
    (1, 0.0, 1.0)
    """

    def __init__(
        self,
        observer: Observer,
        arrays: Mapping[str, Memory],
        repo: Any,
        branch: str = "main",
        *,
        base: str | None = None,
        chunks: Chunking = None,
        places: Mapping[str, SupportsIndex] | None = None,
        memory: Memory | None = None,
        compressors: Any = "auto",
    ) -> None:
        icechunk_package()
        self._participant = Participant(
            observer, arrays, base=base, chunks=chunks, places=places, memory=memory, compressors=compressors
        )
        self._observer = observer
        self._repo = repo
        self._branch = branch
        self._closed = False
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        """Say where it saves."""
        return f"<StoreSink: {len(self._participant.parts)} arrays to {self._branch!r}, at {self._participant.base}>"

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    @property
    def base(self) -> str | None:
        """The last snapshot that was saved, or the one that the arrays were restored from."""
        return self._participant.base

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def save(
        self,
        *,
        step: int | None = None,
        message: str | None = None,
        state: object = None,
        about: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Saved:
        """Collect an epoch and commit what is dirty.

        Parameters
        ----------
        step : int, optional
            What to find it by, beside the epoch's number.
        message : str, optional
            Of the commit; ``"epoch N"`` by default.
        state : object, optional
            What else belongs to it: dicts, lists, text, numbers and bytes; see :func:`state_of`.
        about : mapping, optional
            More to note of the commit, by names of your own: text and numbers. It comes back as ``Version.about``, and
            is read with every history, so keep it short.
        progress : callable, optional
            Called with the bytes written and the bytes to write, after each chunk and from zarr's thread. What it
            raises ends the save as any other failure does.

        Returns
        -------
        Saved
            What was written. Where nothing is dirty, and neither `state` nor `about` given, nothing is, and no snapshot
            is made.

        Raises
        ------
        TypeError, ValueError
            `state` has something else, or `about` a name that is dirtylog's; nothing has changed.
        BranchMoved
            Somebody else has committed to the branch. Nothing is merged.
        InDoubt
            The answer to the commit was lost, and the store does not say whether it is there. The epoch is held; the
            next save asks again.
        Exception
            What the store raised: nothing is committed, and the next save has the same pages.
        """
        with self._lock:
            if self._closed:
                raise ValueError("the sink is closed; make another")
            participant = self._participant
            text, always = encode_state(state), state is not None or about is not None
            if taken := sorted(NOTED & set(about or ())):
                raise ValueError(f"about has {', '.join(taken)}, which dirtylog notes itself; choose other names")
            participant.resolve(self._repo, self._branch)
            session = self._repo.writable_session(self._branch)
            tx = uuid.uuid4().hex
            prepared = participant.prepare(tx, session, progress)
            if not prepared.chunks and participant.base is not None and not always:
                participant.decide(tx, True, participant.base)
                return Saved.of(prepared, participant.base)
            noted = {
                "transaction": tx,
                "observer": self._observer.name,
                "epoch": prepared.epoch,
                "step": step,
                "pages": prepared.pages,
                "exact": prepared.exact,
                "chunks": prepared.chunks,
                "bytes": prepared.nbytes,
                "arrays": [part.name for part in participant.parts],
            }
            try:
                if always:
                    note(session.store, {"transaction": tx, "state": text.decode("ascii")})
                snapshot, adopted = commit_once(
                    self._repo,
                    self._branch,
                    session,
                    message or f"epoch {prepared.epoch}",
                    {**(about or {}), **noted},
                )
            except InDoubt:
                raise
            except Exception:
                participant.decide(tx, False)
                raise
            # An interrupt (KeyboardInterrupt) in between leaves the epoch held: the next save resolves it.
            participant.decide(tx, True, snapshot)
            return Saved.of(prepared, snapshot, adopted)

    def history(self) -> list[Version]:
        """List the snapshots of the branch, oldest first."""
        return history(self._repo, self._branch)

    def restore(
        self,
        snapshot: str | None = None,
        *,
        epoch: int | None = None,
        step: int | None = None,
        out: Mapping[str, Memory] | None = None,
    ) -> dict[str, Any]:
        """Read the arrays as they were at a snapshot, of this branch or another; see :func:`restore`.

        Notes
        -----
        What is restored into the arrays themselves (``out=arrays``) is a write like any other: it is dirty, and the
        next save commits it as the newest state.
        """
        names = [part.name for part in self._participant.parts]
        return restore(self._repo, snapshot, branch=self._branch, epoch=epoch, step=step, names=names, out=out)

    def close(self) -> None:
        """End it. An epoch in doubt is resolved if the store answers; else its pages are pending again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                with suppress(Exception):
                    self._participant.resolve(self._repo, self._branch)
                self._participant.close()
