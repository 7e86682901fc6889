"""Commits one epoch of many participants: all prepare, one commits, all are told; the store is the record.

The order, and why one may die anywhere:

1. Every participant resolves what it still holds, by asking the store. Nothing of an earlier epoch is open afterwards.
2. Each enters its epoch and writes its dirty chunks into a fork of one session. Nobody sees them.
3. The forks are merged and committed: one conditional write. Before it nothing has happened, after it everything has.
4. Each is told, and ends its epoch. Who is not told is in doubt, holds its epoch, and finds out in step 1 of the next.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dirtylog.errors import DirtyLogError
from dirtylog.fleet.engine import Answer, Handle
from dirtylog.sinks.store.branch import BranchMoved, InDoubt, versions
from dirtylog.sinks.store.participant import Prepared, Standing
from dirtylog.sinks.store.sink import commit_once

__all__ = ["Committed", "Coordinator", "Reborn"]


class Reborn(DirtyLogError):
    """A participant is not the one that was admitted: its memory was made again, and what was written to it is gone.

    An engine that revives what has died makes it by its constructor, with whatever that holds. Restore every shard from
    one snapshot, then admit them.
    """


@dataclass(frozen=True, slots=True)
class Committed:
    """One moment of every shard.

    Attributes
    ----------
    snapshot : str
        Its name in the store.
    transaction : str
        The number that it was committed under; empty where nothing was dirty.
    written : bool
        Whether anything was; if not, it is the snapshot before.
    pages : int
        Dirty pages of all shards.
    exact : bool
        Whether just those were written, as far as all sources know.
    chunks, nbytes : int
        What was written: chunks, and bytes before compression.
    shards : dict of str to dict
        By participant: its epoch, pages, chunks, bytes, and its incarnation.
    adopted : bool
        Whether the answer to the commit was lost, and the store itself said that it is there.
    """

    snapshot: str
    transaction: str
    written: bool
    pages: int
    exact: bool
    chunks: int
    nbytes: int
    shards: dict[str, dict[str, Any]]
    adopted: bool


class Coordinator:
    """Takes participants through epochs.

    Parameters
    ----------
    repo : icechunk.Repository
        Where epochs are committed.
    branch : str
        Of it.
    timeout : float
        Seconds to wait for a participant's answer.

    Notes
    -----
    Has no state that matters: another coordinator goes on where this one died, with the same participants. Two at a
    time do no harm: one of their commits is refused. Thread-safe; epochs come one after the other.
    """

    def __init__(self, repo: Any, branch: str = "main", *, timeout: float = 60.0) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; it must be a number of seconds above 0")
        self._repo = repo
        self._branch = branch
        self._timeout = timeout
        self._admitted: dict[str, int] = {}
        self._lock = threading.RLock()

    @property
    def branch(self) -> str:
        """Where epochs are committed."""
        return self._branch

    def admit(self, participants: Mapping[str, Handle]) -> None:
        """Take participants as they are now: as just made, or just restored.

        Parameters
        ----------
        participants : mapping of str to handle
            By name.

        Notes
        -----
        A coordinator that takes over knows those that were in the branch's last commit, and takes no others.
        """
        with self._lock:
            for name, standing in self._ask(participants, "standing").items():
                self._admitted[name] = standing.incarnation

    def epoch(
        self, participants: Mapping[str, Handle], *, step: int | None = None, message: str | None = None
    ) -> Committed:
        """Commit one moment of all participants.

        Parameters
        ----------
        participants : mapping of str to handle
            By name: all of them. Nobody writes to their memory until this returns, or each shard is of a moment of its
            own.
        step : int, optional
            What to find the snapshot by.
        message : str, optional
            Of the commit.

        Returns
        -------
        Committed
            What was committed; nothing is, and no snapshot made, where nothing is dirty.

        Raises
        ------
        Reborn
            A participant was made again, or nobody knows whether it was.
        BranchMoved
            Somebody else has committed, or a participant was restored from another snapshot.
        InDoubt
            The answer to the commit was lost, and the store does not answer. Everybody holds its epoch; the next one
            begins by asking again.
        Exception
            What a participant or the store raised. Nothing is committed, and whoever lives has its pages still.
        """
        if not participants:
            raise ValueError("there are no participants; an epoch has at least one")
        with self._lock:
            standings = self._ask(participants, "resolve", self._repo, self._branch)
            session = self._repo.writable_session(self._branch)
            self._check(standings, session.snapshot_id)
            tx = uuid.uuid4().hex
            sent = False
            try:
                prepared = self._prepare(participants, tx, session)
                written = sum(each.chunks for each in prepared.values())
                about = self._about(tx, step, prepared)
                snapshot, adopted = session.snapshot_id, False
                if written:
                    session.merge(*(each.session for each in prepared.values()))
                    sent = True
                    snapshot, adopted = commit_once(
                        self._repo, self._branch, session, message or f"epoch of {len(prepared)} shards", about
                    )
            except InDoubt:
                raise
            except BaseException as error:
                # What interrupts a commit (KeyboardInterrupt) says nothing about it: all find out for themselves.
                if not sent or isinstance(error, Exception):
                    self._tell(participants, tx, False, None)
                raise
            self._tell(participants, tx, True, snapshot)
            return Committed(
                snapshot=snapshot,
                transaction=tx if written else "",
                written=bool(written),
                pages=about["pages"],
                exact=about["exact"],
                chunks=about["chunks"],
                nbytes=about["bytes"],
                shards=about["shards"],
                adopted=adopted,
            )

    def _check(self, standings: Mapping[str, Standing], tip: str) -> None:
        recorded: Mapping[str, Any] | None = None
        for name, standing in standings.items():
            if standing.base != tip:
                raise BranchMoved(
                    f"shard {name!r} was restored from {standing.base} and {self._branch!r} is at {tip}; restore every "
                    "shard from one snapshot"
                )
            if name not in self._admitted:
                # Another coordinator's participants: the last commit says who they were.
                if recorded is None:
                    last = next(iter(versions(self._repo, snapshot_id=tip)))
                    recorded = last.about.get("shards", {})
                known = recorded.get(name, {}).get("incarnation", "")
                if not known:
                    # Fail closed (I6): if it was made again, it has the right base, and not what was written since.
                    raise Reborn(
                        f"shard {name!r} is not in the last commit of {self._branch!r}, so nobody knows whether it was "
                        "made again since; admit the participants when they are made or restored"
                    )
                self._admitted[name] = int(known)
            if self._admitted[name] != standing.incarnation:
                raise Reborn(
                    f"shard {name!r} is incarnation {standing.incarnation} and not {self._admitted[name]}: it was made "
                    "again, and its memory is not what it was; restore every shard from one snapshot, then admit them"
                )

    def _prepare(self, participants: Mapping[str, Handle], tx: str, session: Any) -> dict[str, Prepared]:
        asked = {name: handle.call("prepare", tx, session.fork()) for name, handle in participants.items()}
        prepared: dict[str, Prepared] = self._wait(asked)
        for name, each in prepared.items():
            if each.incarnation != self._admitted[name]:
                raise Reborn(f"shard {name!r} was made again between two calls; restore every shard from one snapshot")
        return prepared

    def _about(self, tx: str, step: int | None, prepared: Mapping[str, Prepared]) -> dict[str, Any]:
        return {
            "transaction": tx,
            "epoch": max(each.epoch for each in prepared.values()),
            "step": step,
            "pages": sum(each.pages for each in prepared.values()),
            "exact": all(each.exact for each in prepared.values()),
            "chunks": sum(each.chunks for each in prepared.values()),
            "bytes": sum(each.nbytes for each in prepared.values()),
            "shards": {
                name: {
                    # As text: not every reader of JSON has integers of 63 bits.
                    "incarnation": str(each.incarnation),
                    "epoch": each.epoch,
                    "pages": each.pages,
                    "chunks": each.chunks,
                    "bytes": each.nbytes,
                }
                for name, each in prepared.items()
            },
        }

    def _tell(self, participants: Mapping[str, Handle], tx: str, commit: bool, snapshot: str | None) -> None:
        """Tell everybody what was decided; who cannot be told asks the store."""
        asked: list[Answer] = []
        for handle in participants.values():
            with suppress(Exception):
                asked.append(handle.call("decide", tx, commit, snapshot))
        for answer in asked:
            with suppress(Exception):
                answer.result(self._timeout)

    def _ask(self, participants: Mapping[str, Handle], method: str, *args: Any) -> dict[str, Any]:
        return self._wait({name: handle.call(method, *args) for name, handle in participants.items()})

    def _wait(self, asked: Mapping[str, Answer]) -> dict[str, Any]:
        """Wait for all answers, so that nobody is at work any more where one has failed; then raise the first error."""
        found: dict[str, Any] = {}
        failed: Exception | None = None
        for name, answer in asked.items():
            try:
                found[name] = answer.result(self._timeout)
            except Exception as error:
                if failed is None:
                    error.add_note(f"in shard {name!r}")
                    failed = error
        if failed is not None:
            raise failed
        return found
