"""One memory's part in a transaction: it prepares, holds its epoch, and is told or finds out what became of it.

The store is the record of the decision. Between `prepare` and `decide` the epoch is held; whoever is in doubt, because
an answer was lost or the one who decides has died, looks for the transaction among the ancestors of the branch's tip.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

from dirtylog.log import Epoch, Observer
from dirtylog.sinks.store.branch import BranchMoved, InDoubt, since
from dirtylog.sinks.store.parts import Chunking, Part, Written, parts_of, summary, tasks
from dirtylog.sinks.store.zarrs import create, fits, write

if TYPE_CHECKING:
    from dirtylog._typing import Memory
    from dirtylog.sinks.snapshot.chain import Progress

__all__ = ["Participant", "Prepared", "Standing"]


@dataclass(frozen=True, slots=True)
class Prepared(Written):
    """What one participant has written, and not yet committed.

    Attributes
    ----------
    session : object
        The session that it wrote into, to be merged: it may have travelled.
    incarnation : int
        Of the participant.
    epoch : int
        The number of the epoch that it holds.
    pages : int
        Dirty pages.
    dirty_bytes : int
        Bytes of them.
    exact : bool
        Whether the sources vouch for them.
    chunks, nbytes : int
        What was written: chunks, and bytes before compression.
    whole : tuple of str
        Arrays that were written whole.
    """

    session: Any
    incarnation: int


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a participant stands.

    Attributes
    ----------
    incarnation : int
        Chosen at random when it was made: another one is another memory, whatever its name.
    base : str or None
        The snapshot against which its pages are dirty; None where it has none.
    holds : str
        The transaction whose epoch it holds; empty where there is none.
    """

    incarnation: int
    base: str | None
    holds: str


class Participant:
    """Arrays of one memory, whose dirty chunks go into transactions that somebody else commits.

    Parameters
    ----------
    observer : Observer
        Of the log that sees what is written to the arrays. Nobody else collects from it.
    arrays : mapping of str to array
        By their names in the store.
    base : str, optional
        The snapshot that the arrays hold, apart from what the observer has still to report. Without one the next epoch
        writes the arrays whole, and makes them where they are not there.
    chunks, places, memory
        As for :class:`StoreSink`.
    first_row : int, default 0
        Where the arrays begin in the stored ones, which have more rows: a multiple of the chunks' rows.
    compressors : object
        As for ``zarr.create_array``, where it makes arrays.

    Attributes
    ----------
    incarnation : int
        Chosen at random: a participant that is made again is another one.

    Notes
    -----
    Thread-safe. If it is dropped while it holds an epoch, the pages are pending again.
    """

    def __init__(
        self,
        observer: Observer,
        arrays: Mapping[str, Memory],
        *,
        base: str | None = None,
        chunks: Chunking = None,
        places: Mapping[str, SupportsIndex] | None = None,
        memory: Memory | None = None,
        first_row: int = 0,
        compressors: Any = "auto",
    ) -> None:
        self._observer = observer
        self._parts = parts_of(
            arrays,
            observer.npages,
            observer.page_size,
            chunks=chunks,
            places=places,
            memory=memory,
            first_row=first_row,
        )
        self._compressors = compressors
        self._base = base
        self._held: tuple[str, Epoch] | None = None
        # Prepared over our base, rolled back, and perhaps committed for all that: a request can be slow.
        self._tried: set[str] = set()
        self._lock = threading.RLock()
        self.incarnation: int = secrets.randbits(63)

    @property
    def base(self) -> str | None:
        """The snapshot against which its pages are dirty."""
        return self._base

    @property
    def parts(self) -> list[Part]:
        """The arrays as they are stored."""
        return self._parts

    def standing(self) -> Standing:
        """Return where it stands."""
        with self._lock:
            return Standing(self.incarnation, self._base, self._held[0] if self._held else "")

    def prepare(self, tx: str, session: Any, progress: Progress | None = None) -> Prepared:
        """Collect an epoch, write what is dirty into a session, and hold the epoch.

        Parameters
        ----------
        tx : str
            The transaction, by a name of its own.
        session : icechunk.Session
            A session on the participant's base, or a fork of one.
        progress : callable, optional
            Called with the bytes written and the bytes to write, from zarr's thread.

        Returns
        -------
        Prepared
            What there is to commit.

        Raises
        ------
        BranchMoved
            The session is on another snapshot: the pages are not relative to it.
        InDoubt
            It holds another transaction; `resolve` it first.
        Exception
            What the store raised. The epoch is rolled back.
        """
        with self._lock:
            if self._held is not None:
                raise InDoubt(f"transaction {self._held[0]} is held and not decided; call resolve() first")
            if self._base is not None and session.snapshot_id != self._base:
                raise BranchMoved(
                    f"{session.branch or 'the branch'} is at {session.snapshot_id} and these pages are dirty against "
                    f"{self._base}: somebody else has committed. Restore from the branch, or save to another one"
                )
            with ExitStack() as until_held:
                epoch = until_held.enter_context(self._observer.collect())
                work = tasks(self._parts, None if self._base is None else epoch.pages)
                if self._base is None:
                    for part in self._parts:
                        if not fits(session.store, part):
                            create(session.store, part, part.array.shape, self._compressors)
                write(session.store, work, progress)
                prepared = Prepared(session=session, incarnation=self.incarnation, **summary(epoch, work))
                self._held = tx, epoch
                until_held.pop_all()
            return prepared

    def decide(self, tx: str, commit: bool, snapshot: str | None = None) -> bool:
        """End the epoch that is held for a transaction.

        Parameters
        ----------
        tx : str
            The transaction.
        commit : bool
            Whether it is committed; else its pages are pending again.
        snapshot : str, optional
            Under which name, where it is committed.

        Returns
        -------
        bool
            Whether it held that transaction. To be told twice, or what is another's, changes nothing.
        """
        with self._lock:
            if self._held is None or self._held[0] != tx:
                return False
            if commit and not snapshot:
                raise ValueError("a transaction is committed as a snapshot; name it")
            self._end(snapshot if commit else None)
            return True

    def _end(self, snapshot: str | None) -> None:
        assert self._held is not None
        tx, epoch = self._held
        if snapshot is None:
            # Before the pages are pending: from here on a commit that lands late is known as ours.
            self._tried.add(tx)
        else:
            self._base = snapshot
            self._tried.clear()
        self._held = None
        if self._observer.epoch is epoch:
            epoch.commit() if snapshot is not None else epoch.rollback()

    def resolve(self, repo: Any, branch: str = "main") -> Standing:
        """Find out what became of the transaction that is held, and of those before it.

        Parameters
        ----------
        repo : icechunk.Repository
            Where it was to be committed.
        branch : str
            Where in it.

        Returns
        -------
        Standing
            Where it stands now: nothing is held.

        Raises
        ------
        Exception
            What the store raised; everything is as before.

        Notes
        -----
        Asks the store only where something is in doubt. A commit that is on its way still is not there yet: it is
        rolled back, its pages are written again, and if it lands it is known as ours.
        """
        with self._lock:
            if self._held is None and not self._tried:
                return self.standing()
            held = self._held[0] if self._held else ""
            try:
                later = since(repo, branch, self._base)
            except BranchMoved:
                later = []
            ours = [version.transaction in {held, *self._tried} - {""} for version in later]
            landed = next((version.snapshot for version in later if held and version.transaction == held), None)
            if landed is not None:
                self._end(landed)
            elif held:
                self._end(None)
            # Whose commits lie between our base and the tip: our base moves over those that are ours alone.
            if landed is None and self._base is not None and later and all(ours):
                self._base = later[0].snapshot
            return self.standing()

    def close(self) -> None:
        """Roll back what is held."""
        with self._lock:
            if self._held is not None:
                self._end(None)
