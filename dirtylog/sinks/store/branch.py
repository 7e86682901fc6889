"""A branch of an Icechunk repository as the record of what was committed: by whom, over what, in which transaction."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from inspect import signature
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from dirtylog.errors import BackendUnavailable, DirtyLogError
from dirtylog.sinks.snapshot.footer import decode_state
from dirtylog.sinks.store.zarrs import ATTRIBUTE, describe, noted, read, zarr_package

__all__ = [
    "BranchMoved",
    "InDoubt",
    "Version",
    "described",
    "exists",
    "find",
    "history",
    "repository",
    "restore",
    "since",
    "state_of",
    "versions",
]


class BranchMoved(DirtyLogError):
    """Somebody else has committed to the branch: what is dirty here is not relative to what is there now.

    Nothing is written over it, and nothing is merged: a merge of chunks would make a state that was never in any
    memory. The pages are dirty still.
    """


class InDoubt(DirtyLogError):
    """A commit was sent and its answer was lost, and the store does not say whether it is there.

    The epoch is held. The next save asks the store again, and goes on from what it answers.
    """


@dataclass(frozen=True, slots=True)
class Version:
    """One snapshot of a branch.

    Attributes
    ----------
    snapshot, parent : str
        Icechunk's names of it and of the one before; no parent where it is the first.
    time : datetime
        When it was committed.
    message : str
        As it was given.
    transaction : str
        The number that the epoch was committed under; empty where somebody else wrote it.
    epoch : int
        The epoch's number, 0 where there is none.
    step : int or None
        As it was given.
    pages : int
        Dirty pages of the epoch.
    exact : bool
        Whether just those were written, as far as the sources know.
    about : dict
        Everything that dirtylog noted.
    """

    snapshot: str
    parent: str | None
    time: datetime
    message: str
    transaction: str
    epoch: int
    step: int | None
    pages: int
    exact: bool
    about: Mapping[str, Any]


def icechunk_package() -> Any:
    """Import icechunk.

    Raises
    ------
    BackendUnavailable
        It is not installed.
    """
    zarr_package()
    try:
        import icechunk
    except ImportError as error:
        raise BackendUnavailable(
            "a store", f"import icechunk: {error}", "pip install 'icechunk>=1.1' 'zarr>=3.1'"
        ) from None
    return icechunk


def repository(where: str | os.PathLike[str], *, create: bool = True, config: Any = None, **options: Any) -> Any:
    """Open an Icechunk repository, or make one.

    Parameters
    ----------
    where : str or path
        A directory, ``"s3://bucket/prefix"``, ``"gs://bucket/prefix"``, ``"az://account/container/prefix"``, or
        ``"memory://"``, which nobody else sees. Options may follow, as in
        ``"s3://bucket/prefix?endpoint_url=http://127.0.0.1:9000&allow_http=true&force_path_style=true"``: those, and
        `region` and `anonymous`. Never keys: they would be in every log.
    create : bool
        Make it if it is not there.
    config : icechunk.RepositoryConfig, optional
        As for ``icechunk.Repository.open``.
    **options
        For ``icechunk.s3_storage``, ``gcs_storage`` or ``azure_storage``: region, endpoint, credentials. By default
        they come from the environment.

    Returns
    -------
    icechunk.Repository
        What :class:`StoreSink` writes to. Made in version 1 of Icechunk's format, which its releases 1 and 2 read.

    Raises
    ------
    BackendUnavailable
        The package icechunk or zarr is not installed.
    ValueError
        `where` names no kind of store that is known.

    Notes
    -----
    In a directory two *processes* must not commit at the same time: file systems have no conditional write. Object
    stores have.
    """
    icechunk = icechunk_package()
    storage = _storage(icechunk, os.fspath(where), options)
    kind = icechunk.Repository
    if kind.exists(storage) or not create:
        return kind.open(storage, config)
    spec = {"spec_version": 1} if "spec_version" in signature(kind.create).parameters else {}
    return kind.create(storage, config, **spec)


def exists(where: str) -> bool:
    """Whether there is a repository at an address, with what the environment says."""
    icechunk = icechunk_package()
    return bool(icechunk.Repository.exists(_storage(icechunk, where, {})))


def _storage(icechunk: Any, where: str, options: Mapping[str, Any]) -> Any:
    parts = urlsplit(where if "://" in where else "")
    path = parts.path.strip("/")
    options = {**_asked(parts.query), **options}
    secrets = [key for key in options if "key" in key or "token" in key or key in ("anonymous", "get_credentials")]
    environment = {} if secrets or "from_env" in options else {"from_env": True}
    if "://" not in where or parts.scheme == "file":
        if options:
            raise ValueError(f"a directory has no options, and there is {', '.join(sorted(options))}")
        return icechunk.local_filesystem_storage(os.path.abspath(where if "://" not in where else parts.path))
    if parts.scheme == "memory":
        return icechunk.in_memory_storage()
    if parts.scheme == "s3":
        return icechunk.s3_storage(bucket=parts.netloc, prefix=path or None, **environment, **options)
    if parts.scheme in ("gs", "gcs"):
        return icechunk.gcs_storage(bucket=parts.netloc, prefix=path or None, **environment, **options)
    if parts.scheme in ("az", "azure"):
        container, _, prefix = path.partition("/")
        return icechunk.azure_storage(
            account=parts.netloc, container=container, prefix=prefix, **environment, **options
        )
    raise ValueError(f"{where} is no store that is known; use a directory, s3://, gs://, az:// or memory://")


def _asked(query: str) -> dict[str, Any]:
    """Return the options that follow an address."""
    asked: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in ("region", "endpoint_url") and value:
            asked[name] = value
        elif name in ("allow_http", "anonymous", "force_path_style") and value in ("true", "false"):
            asked[name] = value == "true"
        else:
            raise ValueError(
                f"the address has {name}={'...' if 'key' in name or 'token' in name else value}; it may have region "
                "and endpoint_url, and allow_http, anonymous and force_path_style as true or false. Keys come from the "
                "environment, or from the arguments of repository()"
            )
    return asked


def versions(repo: Any, **where: Any) -> Iterator[Version]:
    """Go through a branch or the ancestors of a snapshot, newest first."""
    for info in repo.ancestry(**where):
        about = info.metadata.get(ATTRIBUTE)
        about = about if isinstance(about, dict) else {}
        yield Version(
            snapshot=info.id,
            parent=info.parent_id,
            time=info.written_at,
            message=info.message,
            transaction=str(about.get("transaction", "")),
            epoch=int(about.get("epoch", 0)),
            step=about.get("step"),
            pages=int(about.get("pages", 0)),
            exact=bool(about.get("exact", True)),
            about=about,
        )


def history(repo: Any, branch: str = "main") -> list[Version]:
    """List the snapshots of a branch, oldest first: epochs, and what others have committed.

    Parameters
    ----------
    repo : icechunk.Repository
        Where.
    branch : str
        Of that name.
    """
    return list(versions(repo, branch=branch))[::-1]


def since(repo: Any, branch: str, base: str | None) -> list[Version]:
    """List what was committed to a branch after a snapshot, newest first; all of it without one.

    Raises
    ------
    BranchMoved
        The snapshot is not on the branch any more.
    """
    found: list[Version] = []
    for version in versions(repo, branch=branch):
        if version.snapshot == base:
            return found
        found.append(version)
    if base is None:
        return found
    raise BranchMoved(f"the branch {branch!r} does not have the snapshot {base} any more: it was reset; save it again")


def find(repo: Any, branch: str, snapshot: str | None = None, epoch: int | None = None, step: int | None = None) -> str:
    """Return a snapshot by what is known of it; the newest by default, and the newer of two of one number.

    Raises
    ------
    KeyError
        There is none.
    """
    if sum(each is not None for each in (snapshot, epoch, step)) > 1:
        raise ValueError("give a snapshot, an epoch or a step: one of them")
    if snapshot is not None:
        return snapshot
    for version in versions(repo, branch=branch):
        if not version.transaction:
            continue
        if (epoch is None or version.epoch == epoch) and (step is None or version.step == step):
            return version.snapshot
    what = f"epoch {epoch}" if epoch is not None else f"step {step}" if step is not None else "snapshot of ours"
    raise KeyError(f"the branch {branch!r} has no {what}; history() lists what it has")


def restore(
    repo: Any,
    snapshot: str | None = None,
    *,
    branch: str = "main",
    epoch: int | None = None,
    step: int | None = None,
    names: Any = None,
    out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Read arrays as they were at a snapshot, of one moment.

    Parameters
    ----------
    repo : icechunk.Repository
        Where.
    snapshot : str, optional
        Which; or the newest with this `epoch` or `step`, or the newest.
    branch : str
        Where to look for it.
    epoch, step : int, optional
        Which.
    names : iterable of str, optional
        Which arrays; all, or those in `out`.
    out : mapping of str to array, optional
        Arrays of the same shapes and types to fill in place.

    Returns
    -------
    dict of str to ndarray
        New arrays, or `out`.

    Raises
    ------
    KeyError
        There is no such snapshot, or array.
    ValueError
        One of `out` has another shape or type; nothing is written then.
    """
    session = repo.readonly_session(snapshot_id=find(repo, branch, snapshot, epoch, step))
    return read(session.store, names, out)


def state_of(
    repo: Any,
    snapshot: str | None = None,
    *,
    branch: str = "main",
    epoch: int | None = None,
    step: int | None = None,
) -> Any:
    """Return the state that was saved with a snapshot; None where there was none.

    Parameters
    ----------
    repo, snapshot, branch, epoch, step
        As for :func:`restore`.

    Raises
    ------
    KeyError
        There is no such snapshot.
    SnapshotError
        What is there is no state.
    """
    chosen = find(repo, branch, snapshot, epoch, step)
    version = next(versions(repo, snapshot_id=chosen))
    said = noted(repo.readonly_session(snapshot_id=chosen).store) if version.transaction else {}
    # What an earlier snapshot said is still there.
    if not said or said.get("transaction") != version.transaction:
        return None
    return decode_state(str(said.get("state", "")).encode("ascii", "replace"), f"snapshot {chosen}")


def described(repo: Any, snapshot: str, names: Any = None) -> list[tuple[str, str, list[int], int]]:
    """Return name, type, shape and bytes of the arrays of a snapshot; of those of some names."""
    return describe(repo.readonly_session(snapshot_id=snapshot).store, names)
