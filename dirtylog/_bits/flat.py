"""What has memory, as the flat bytes that page numbers count: the one door for arrays and buffers of every kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["flat_array", "flat_bytes"]

_WAYS = "pass a NumPy array, a buffer (mmap, memoryview, SharedMemory, bytearray), or an object that exports one"


def flat_array(memory: Memory | object, *, what: str = "memory", empty: bool = False) -> npt.NDArray[np.uint8]:
    """Return memory as a one-dimensional array of its bytes, in the order of their addresses; never a copy.

    I9: page `i` is bytes ``[i * page_size, (i + 1) * page_size)`` of this array, whatever its address.

    Parameters
    ----------
    memory : object
        A NumPy array of any dtype, C or Fortran order; anything with the buffer
        protocol; a `multiprocessing.shared_memory.SharedMemory`; or an object
        with ``__array_interface__``, DLPack (a PyTorch tensor on the CPU) or
        ``__array__`` (a pandas Series) that shares its memory.
    what : str
        What errors call it.
    empty : bool
        Whether memory of no bytes will do.

    Returns
    -------
    ndarray of uint8, shape (nbytes,)
        Read-only where the memory is. Keeps the memory alive.

    Raises
    ------
    TypeError
        It has no memory, or it holds Python objects: their bytes are addresses,
        which mean nothing to anybody else or later.
    ValueError
        Its bytes do not lie together, there are none, or it hands out copies.
    """
    array = _array_of(memory, what)
    if array.dtype.hasobject:
        raise TypeError(
            f"{what} holds Python objects (dtype {array.dtype}): its bytes are addresses, and restoring them "
            "would give pointers into nowhere; keep the values in an array of numbers or of fixed-width strings"
        )
    if array.nbytes == 0:
        if empty:
            return np.empty(0, np.uint8)
        raise ValueError(f"{what} is empty; at least one byte is needed")
    if not array.flags.c_contiguous:
        # Fortran order, in as many dimensions as there are: its transpose has the same bytes in C order.
        array = array.T
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{what} is not contiguous (shape {array.T.shape}, strides {array.T.strides}): its bytes do not lie "
            "together; pass the array that it is a view of, or numpy.ascontiguousarray() of it"
        )
    return array.reshape(-1).view(np.uint8)


def flat_bytes(memory: Memory | object, *, writable: bool = False, what: str = "memory") -> memoryview:
    """Return memory as a flat view of bytes; see :func:`flat_array`.

    Raises
    ------
    TypeError, ValueError
        As `flat_array`; also where it is read-only and `writable` is asked for.
    """
    flat: Any = flat_array(memory, what=what)
    if writable and not flat.flags.writeable:
        raise ValueError(f"{what} is read-only; pass writable memory")
    return memoryview(flat)


def _array_of(memory: Any, what: str) -> npt.NDArray[Any]:
    if isinstance(memory, np.ndarray):
        return memory.view(np.ndarray)
    named = getattr(memory, "buf", None)
    if isinstance(named, memoryview):  # multiprocessing.shared_memory.SharedMemory
        memory = named
    try:
        view = memoryview(memory)
    except TypeError:
        return _exported(memory, what)
    except (BufferError, ValueError) as error:
        raise ValueError(f"{what} does not lend its memory ({error})") from error
    if view.format == "O":
        raise TypeError(f"{what} holds Python objects: its bytes are addresses; keep numbers in it")
    if view.nbytes and view.c_contiguous:
        # By way of frombuffer: formats of ctypes and structured items are nothing that NumPy must understand.
        return np.frombuffer(memory, np.uint8)
    return np.asarray(view)


def _exported(memory: Any, what: str) -> npt.NDArray[Any]:
    """Ask the protocols by which libraries lend arrays, and refuse what comes as a copy."""
    kind = type(memory).__name__
    if hasattr(memory, "__dlpack__"):
        try:
            lent = np.from_dlpack(memory)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{what} is a {kind} whose memory NumPy cannot share ({error}); pass tensor.detach(), for a dtype that "
                "NumPy lacks tensor.view(torch.uint8), and for another device a copy on the CPU"
            ) from error
        if not lent.flags.writeable and hasattr(memory, "__array__"):
            again = np.asarray(memory)  # the same memory, and writable where it is
            if again.ctypes.data == lent.ctypes.data and again.strides == lent.strides:
                return again
        return lent
    if hasattr(memory, "__array_interface__") or hasattr(memory, "__array__"):
        lent, again = np.asarray(memory), np.asarray(memory)
        if lent.nbytes and lent.ctypes.data != again.ctypes.data:
            raise ValueError(
                f"{what} is a {kind} that hands out copies of its memory, and what is written to it would go unseen; "
                "pass the array that holds its values"
            )
        return lent
    raise TypeError(f"{what} is {kind}, which has no memory of its own; {_WAYS}")
