"""Writes the chunks of arrays to Zarr, many at once, and reads arrays back."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.flat import array_of
from dirtylog.errors import BackendUnavailable, DirtyLogError
from dirtylog.sinks.snapshot.chain import Progress
from dirtylog.sinks.snapshot.space import dtype_of
from dirtylog.sinks.store.parts import Part, Task

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["ATTRIBUTE", "create", "describe", "note", "noted", "read", "write", "zarr_package"]

# Under this name is what Zarr cannot say of an array, and of a commit what Icechunk cannot.
ATTRIBUTE = "dirtylog"
# Chunks that are encoded and sent at once. More take memory, and an object store's answer is awaited anyway.
AT_ONCE = 32
# What is read of an array at once, in bytes.
SPAN = 64 << 20


def zarr_package() -> Any:
    """Import zarr.

    Raises
    ------
    BackendUnavailable
        It is not installed, or older than 3.1.
    """
    try:
        import zarr
        from zarr.core import sync  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            "a store", f"import zarr: {error}", "pip install 'icechunk>=1.1' 'zarr>=3.1'"
        ) from None
    if tuple(map(int, zarr.__version__.split(".")[:2])) < (3, 1):
        raise BackendUnavailable("a store", f"zarr is {zarr.__version__}", "pip install 'zarr>=3.1'")
    return zarr


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run in the thread in which zarr itself runs what is asynchronous; nests in a loop of the caller."""
    from zarr.core.sync import sync

    return sync(work)


def create(store: Any, part: Part, shape: Sequence[int], compressors: Any = "auto") -> None:
    """Make the array of a part, in place of one of that name that is there.

    Parameters
    ----------
    store : zarr store
        Where.
    part : Part
        Whose type and chunks.
    shape : sequence of int
        Of the stored array, which may have more rows.
    compressors : object
        As for ``zarr.create_array``.
    """
    zarr_package().create_array(
        store,
        name=part.name,
        shape=tuple(shape),
        chunks=part.chunks.chunks,
        dtype=part.array.dtype,
        compressors=compressors,
        attributes={ATTRIBUTE: {"dtype": part.kind}},
        overwrite=True,
    )


def note(store: Any, what: Mapping[str, Any]) -> None:
    """Set what the root group says, in place of what it said."""
    zarr_package().open_group(store, mode="a").attrs[ATTRIBUTE] = dict(what)


def noted(store: Any) -> Mapping[str, Any]:
    """Return what the root group says; nothing where it does not."""
    said = zarr_package().open_group(store, mode="r").attrs.asdict().get(ATTRIBUTE)
    return said if isinstance(said, dict) else {}


def fits(store: Any, part: Part) -> bool:
    """Whether the store has the array of a part, with its type, shape and chunks."""
    zarr = zarr_package()
    try:
        array = zarr.open_array(store, path=part.name, mode="r")
    except (FileNotFoundError, zarr.errors.ContainsGroupError):
        return False
    return bool(
        array.shape == part.array.shape
        and array.chunks == part.chunks.chunks
        and array.dtype == part.array.dtype
        and array.attrs.asdict().get(ATTRIBUTE) == {"dtype": _plain(part.kind)}
    )


def _plain(kind: Any) -> Any:
    """As JSON gives it back."""
    return [_plain(each) for each in kind] if isinstance(kind, list | tuple) else kind


def write(store: Any, work: Sequence[Task], progress: Progress | None = None) -> None:
    """Write what is dirty, or whole arrays, `AT_ONCE` chunks at a time.

    Parameters
    ----------
    store : zarr store
        Where the arrays are.
    work : sequence of Task
        What of them.
    progress : callable, optional
        Called with the bytes written and the bytes to write, from zarr's thread.

    Notes
    -----
    Nothing is written any more when it ends, also where a signal handler raises: what is on its way then is waited for,
    because in a mirror it would land over what the next save writes.
    """
    if not work:
        return
    zarr_package()
    failed: list[BaseException] = []
    ended = threading.Event()
    writing = _write(store, work, progress, failed, ended)
    try:
        run(writing)
    except Exception:
        raise
    except BaseException as interrupt:
        failed.append(interrupt)
        # One that has not begun by now finds that it is to write nothing.
        if inspect.getcoroutinestate(writing) != inspect.CORO_CREATED:
            ended.wait()
        raise


async def _write(
    store: Any, work: Sequence[Task], progress: Progress | None, failed: list[BaseException], ended: threading.Event
) -> None:
    try:
        await _write_chunks(store, work, progress, failed)
    finally:
        ended.set()


async def _write_chunks(
    store: Any, work: Sequence[Task], progress: Progress | None, failed: list[BaseException]
) -> None:
    from zarr.api import asynchronous
    from zarr.core.array import AsyncArray

    arrays = []
    for task in work:
        stored: Any = await asynchronous.open_array(store=store, path=task.part.name, mode="r+")
        # Every byte as it is: a chunk of -0.0 or of the fill value is a chunk.
        config: Any = {"write_empty_chunks": True, "order": "C"}
        array = AsyncArray(metadata=stored.metadata, store_path=stored.store_path, config=config)
        arrays.append(_Chunks(array, task.part.sparse))
    puts = (
        (chunks, task.part, place)
        for chunks, task in zip(arrays, work, strict=True)
        for place in map(task.part.chunks.slices, task.all_numbers())
    )
    done, total = 0, sum(task.nbytes for task in work)

    async def put_some() -> None:
        nonlocal done
        for chunks, part, place in puts:
            if failed:
                return
            try:
                value = part.array[place]  # it may have to be read, and fail
                await chunks.put(part.selection(place), value)
                done += value.nbytes
                if progress is not None:
                    progress(done, total)
            except BaseException as error:
                failed.append(error)

    # All have ended before one is raised: none goes on to write after a roll-back.
    await asyncio.gather(*(put_some() for _ in range(AT_ONCE)))
    if failed:
        raise failed[0]


class _Chunks:
    """Writes chunks of an array: encoded by its codecs and sent, without what an assignment makes of a selection.

    That was half of the time of a save. It is made of zarr's inner parts, which move from release to release: where one
    is not there, chunks are assigned.
    """

    def __init__(self, stored: Any, sparse: bool) -> None:
        self._stored = stored
        self._sparse = sparse
        self._prefix = f"{stored.store_path.path}/" if stored.store_path.path else ""
        self._spec: Any = None
        try:
            from zarr.core.array_spec import ArraySpec
            from zarr.core.buffer import default_buffer_prototype

            self._prototype: Any = default_buffer_prototype()
            self._encode = stored.codec_pipeline.encode
            self._key = stored.metadata.encode_chunk_key
            self._spec = ArraySpec(
                shape=stored.chunks,
                dtype=stored.metadata.dtype,
                fill_value=stored.metadata.fill_value,
                config=stored.config,
                prototype=self._prototype,
            )
        except (AttributeError, ImportError, TypeError):
            pass

    async def put(self, place: tuple[slice, ...], value: npt.NDArray[Any]) -> None:
        """Write one chunk of the grid: what lies in the array there."""
        stored = self._stored
        if self._spec is None or stored.shards is not None:  # a shard has chunks in it
            await stored.setitem(place, value)
            return
        key = self._prefix + self._key(tuple(at.start // size for at, size in zip(place, stored.chunks, strict=True)))
        if self._sparse and not value.any():
            await stored.store_path.store.delete(key)
            return
        if value.shape != stored.chunks:  # one that is cut short at the end of an axis is filled up
            await stored.setitem(place, value)
            return
        chunk = self._prototype.nd_buffer.from_numpy_array(np.ascontiguousarray(value))
        (encoded,) = await self._encode([(chunk, self._spec)])
        await stored.store_path.store.set(key, encoded)


def read(
    store: Any,
    names: Iterable[str] | None = None,
    out: Mapping[str, Memory] | None = None,
    rows: slice | None = None,
) -> dict[str, Any]:
    """Read arrays.

    Parameters
    ----------
    store : zarr store
        Where they are.
    names : iterable of str, optional
        Which; those in `out`, or all that are there.
    out : mapping of str to array, optional
        Arrays to fill.
    rows : slice, optional
        Which rows; all by default.

    Returns
    -------
    dict of str to ndarray
        New arrays, or `out`.

    Raises
    ------
    KeyError
        There is no array of that name.
    ValueError
        One of `out` has another shape or type; nothing is written then.
    """
    zarr = zarr_package()
    group = zarr.open_group(store, mode="r")
    if names is None:
        names = out if out is not None else _all_names(group)
    stored = {name: _stored(group, name) for name in names}
    kinds = {name: _kind(array, name) for name, array in stored.items()}
    filled: dict[str, Any] = {}
    for name, array in stored.items():
        shape = array.shape if kinds[name] is None else array.shape[:-1]
        if rows is not None and shape:
            shape = (len(range(*rows.indices(shape[0]))), *shape[1:])
        kind = kinds[name]
        dtype: np.dtype[Any] = array.dtype if kind is None else kind
        if out is None:
            filled[name] = np.empty(shape, dtype)
            continue
        target = array_of(out[name], f"out[{name!r}]")
        bytewise = target.dtype.kind == "V" and target.dtype.names is None
        if target.shape != shape or (target.dtype != dtype and not (bytewise and target.itemsize == dtype.itemsize)):
            raise ValueError(
                f"out[{name!r}] is of shape {target.shape} and type {target.dtype}; the stored array is of {shape} and "
                f"{dtype}"
            )
        if not target.flags.writeable:
            raise ValueError(f"out[{name!r}] is read-only; pass writable memory")
        filled[name] = target.view(dtype) if bytewise else target
    for name, array in stored.items():
        _fill(array, filled[name], kinds[name], rows)
    return filled if out is None else dict(out)


def describe(store: Any, names: Iterable[str] | None = None) -> list[tuple[str, str, list[int], int]]:
    """Return name, type, shape and bytes of arrays, as they are when they are read; of all if none is named."""
    group = zarr_package().open_group(store, mode="r")
    found = []
    for name in _all_names(group) if names is None else names:
        array = _stored(group, name)
        kind = _kind(array, name)
        shape = array.shape if kind is None else array.shape[:-1]
        dtype = array.dtype if kind is None else kind
        found.append((name, str(dtype), list(shape), math.prod(shape) * dtype.itemsize))
    return found


def _all_names(group: Any) -> list[str]:
    return sorted(name for name, each in group.members(None) if hasattr(each, "shape"))


def _stored(group: Any, name: str) -> Any:
    array = group.get(name)
    if array is None or not hasattr(array, "shape"):
        raise KeyError(f"the store has no array {name!r}; it has {', '.join(_all_names(group)[:20]) or 'none'}")
    return array


def _kind(array: Any, name: str) -> np.dtype[Any] | None:
    """Return the type that an array of bytes stands for; None where it is what it is."""
    said = array.attrs.asdict().get(ATTRIBUTE)
    if not isinstance(said, dict) or "dtype" not in said:
        return None
    kind = dtype_of(said["dtype"], f"array {name!r}")
    if kind == array.dtype:
        return None
    if array.dtype != np.uint8 or not array.shape or array.shape[-1] != kind.itemsize or kind.hasobject:
        raise DirtyLogError(f"array {name!r} says that it is of {kind}, and is of {array.dtype} and {array.shape}")
    return kind


def _fill(stored: Any, target: npt.NDArray[Any], kind: np.dtype[Any] | None, rows: slice | None) -> None:
    """Read an array a stretch of rows at a time: what is read lies in memory twice for a moment."""
    if target.ndim == 0:
        target[...] = _typed(stored[...], kind)
        return
    first = 0 if rows is None else rows.indices(stored.shape[0])[0]
    step = max(1, SPAN // max(1, target.nbytes // max(1, len(target))))
    step = -(-step // stored.chunks[0]) * stored.chunks[0]
    for at in range(0, len(target), step):
        end = min(at + step, len(target))
        target[at:end] = _typed(stored[first + at : first + end], kind)


def _typed(found: Any, kind: np.dtype[Any] | None) -> npt.NDArray[Any]:
    array = np.asarray(found)
    return array if kind is None else np.ascontiguousarray(array).view(kind)[..., 0]
