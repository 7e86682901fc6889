"""Writes the arrays of a checkpoint as files that other programs read: ``.npy``, ``.npz`` and Zarr."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from dirtylog.errors import BackendUnavailable
from dirtylog.sinks._bytes.pageio import sync_directory
from dirtylog.sinks.checkpoint.checkpoint import keeper
from dirtylog.sinks.snapshot.chain import Progress, StrPath
from dirtylog.sinks.snapshot.staged import rename_new

__all__ = ["KINDS", "export"]

Arrays = Mapping[str, np.ndarray[Any, Any]]


def _npy(path: str, arrays: Arrays) -> None:
    if len(arrays) != 1:
        raise ValueError(
            f"a .npy file holds one array, and there are {len(arrays)}: {', '.join(sorted(arrays)[:10])}; name one of "
            "them, or write .npz"
        )
    with open(path, "xb") as file:
        np.lib.format.write_array(file, next(iter(arrays.values())), allow_pickle=False)


def _npz(path: str, arrays: Arrays) -> None:
    # As numpy.savez, which cannot take every name.
    with zipfile.ZipFile(path, "x", allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _zarr(path: str, arrays: Arrays) -> None:
    try:
        import zarr
    except ImportError as error:
        raise BackendUnavailable("zarr", f"import zarr: {error}", "pip install zarr, or write .npz") from None
    group = zarr.open_group(path, mode="w")
    for name, array in arrays.items():
        if array.ndim:
            group[name] = np.ascontiguousarray(array)
        else:
            # Assigning to a group of zarr 3 takes an axis. In zarr 2 the call has another name.
            create = getattr(group, "create_array", None) or group.create_dataset
            create(name, shape=(), dtype=array.dtype)[...] = array


KINDS: dict[str, Callable[[str, Arrays], None]] = {".npy": _npy, ".npz": _npz, ".zarr": _zarr}


def export(
    directory: StrPath | Any,
    target: StrPath,
    step: int | None = None,
    *,
    names: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write the arrays of a checkpoint as ``.npy``, ``.npz`` or ``.zarr``, which appears whole or not at all.

    Parameters
    ----------
    directory : str, path or icechunk.Repository
        Where the checkpoints are, as for :meth:`Checkpoint.load`.
    target : str or path
        What to write; its ending says how. It must not exist.
    step : int, optional
        Which checkpoint; the latest by default.
    names : iterable of str, optional
        Which arrays; all by default. ``.npy`` holds one.
    progress : callable, optional
        Called with the bytes read and the bytes to read, of a directory. What it raises leaves nothing behind.

    Returns
    -------
    list of str
        Names of the arrays that were written.

    Raises
    ------
    KeyError
        There is no checkpoint of that step, or no array of that name.
    ValueError
        The ending is unknown, or an array's name or type will not do for it.
    FileExistsError
        There is something of that name.
    OSError
        The disk is full, ...
    BackendUnavailable
        ``.zarr`` needs the package zarr.
    SnapshotError
        The checkpoint is damaged.

    Notes
    -----
    Takes the memory of the arrays that are written, and of a directory checks all of the checkpoint.
    """
    path = os.path.abspath(os.fspath(target))
    ending = os.path.splitext(path)[1]
    if ending not in KINDS:
        raise ValueError(f"{path} ends in {ending!r}; it must end in one of {', '.join(KINDS)}")
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "an export overwrites nothing; remove it, or give another name", path)
    wanted = None if names is None else list(dict.fromkeys(names))
    arrays: dict[str, Any] = keeper(directory).whole(directory, step, wanted, progress)
    chosen = list(arrays) if wanted is None else wanted
    for name in chosen:
        # The name becomes a path inside the file.
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
            raise ValueError(f"the array {name!r} cannot be written by that name: it is a path out of the file")
    staging = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{secrets.token_hex(8)}{ending}")
    try:
        KINDS[ending](staging, {name: arrays[name] for name in chosen})
        _sync(staging)
        rename_new(staging, path)
        with suppress(OSError):  # it is there
            sync_directory(os.path.dirname(path))
    except BaseException as error:
        with suppress(FileNotFoundError):
            shutil.rmtree(staging) if os.path.isdir(staging) else os.unlink(staging)
        if isinstance(error, OSError) and error.errno and str(error.filename or staging).startswith(staging):
            # By the name that was asked for.
            raise OSError(error.errno, os.strerror(error.errno), path) from error
        raise
    return chosen


def _sync(path: str) -> None:
    """Have a file on disk, or all files below a directory, so that a power cut leaves no name without its content."""
    below = [os.path.join(place, name) for place, _, names in os.walk(path) for name in names]
    for each in below if os.path.isdir(path) else [path]:
        with open(each, "rb") as file:
            os.fsync(file.fileno())
    for place, _, _ in os.walk(path):
        sync_directory(place)
