"""What has memory, as the flat bytes that page numbers count: the one door for arrays and buffers of every kind."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from dirtylog._typing import Memory

__all__ = ["array_of", "flat_array", "flat_bytes"]

# The names of items in a buffer's format, in which an O is not an object.
_NAME = re.compile(":[^:]*:")
_WAYS = "pass a NumPy array, a buffer (mmap, memoryview, SharedMemory, bytearray), or an object that exports one"


def flat_array(memory: Memory | object, *, what: str = "memory", empty: bool = False) -> npt.NDArray[np.uint8]:
    """Return memory as a one-dimensional array of its bytes, in the order of their addresses; never a copy.

    I9: page `i` is bytes ``[i * page_size, (i + 1) * page_size)`` of this array, whatever its address.

    Parameters
    ----------
    memory : object
        A NumPy array of any dtype, in C, Fortran or any other order without gaps;
        anything with the buffer protocol; a `multiprocessing.shared_memory.SharedMemory`;
        a PyTorch tensor on the CPU, of any dtype; or an object with
        ``__array_interface__``, DLPack or ``__array__`` (a pandas Series) that
        shares its memory.
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
    array = array_of(memory, what)
    if array.nbytes == 0:
        if empty:
            return np.empty(0, np.uint8)
        raise ValueError(f"{what} is empty; at least one byte is needed")
    # The axis with the widest strides first: in that order of its axes, memory without gaps is C-contiguous.
    dense = array.transpose(sorted(range(array.ndim), key=lambda axis: -array.strides[axis]))
    if not dense.flags.c_contiguous:
        raise ValueError(
            f"{what} is not contiguous (shape {array.shape}, strides {array.strides}): its bytes do not lie "
            "together; pass the array that it is a view of, or work on numpy.ascontiguousarray() of it"
        )
    return dense.reshape(-1).view(np.uint8)


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


def array_of(memory: Any, what: str) -> npt.NDArray[Any]:
    """Return memory as an array of its own shape and order; see :func:`flat_array`."""
    if isinstance(memory, np.ma.MaskedArray):
        raise TypeError(f"{what} is a masked array, which is two arrays; pass its .data, and its .mask beside it")
    array = _lent(memory, what)
    if array.dtype.hasobject:
        raise TypeError(
            f"{what} holds Python objects (dtype {array.dtype}): its bytes are addresses, and restoring them "
            "would give pointers into nowhere; keep the values in an array of numbers or of fixed-width strings"
        )
    return array


def _lent(memory: Any, what: str) -> npt.NDArray[Any]:
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
    if "O" in _NAME.sub("", view.format):
        raise TypeError(f"{what} holds Python objects: its bytes are addresses; keep numbers in it")
    if view.nbytes and view.c_contiguous and view.itemsize:
        # By way of frombuffer: formats of ctypes and structured items are nothing that NumPy must understand.
        return np.frombuffer(memory, f"V{view.itemsize}").reshape(view.shape)
    return np.asarray(view)


def _exported(memory: Any, what: str) -> npt.NDArray[Any]:
    """Ask the protocols by which libraries lend arrays, and refuse what comes as a copy."""
    kind = type(memory).__name__
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(memory, torch.Tensor):
        memory = _plain_tensor(torch, memory)
    if hasattr(memory, "__dlpack__"):
        try:
            lent: npt.NDArray[Any] = np.from_dlpack(memory)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{what} is a {kind} whose memory NumPy cannot share ({error}); pass a view of it in a dtype that "
                "NumPy has, and for another device the copy on the CPU that you keep"
            ) from error
        if not lent.flags.writeable and hasattr(memory, "__array__"):
            again = np.asarray(memory)  # the same memory, and writable where it is
            if again.ctypes.data == lent.ctypes.data and again.strides == lent.strides:
                return again
        return lent
    dtype = getattr(memory, "dtype", None)
    if dtype is not None and not isinstance(dtype, np.dtype) and not hasattr(memory, "__array_interface__"):
        raise TypeError(
            f"{what} is a {kind} of {dtype}, which keeps a mask beside its values, or values that a write replaces: "
            "part of what is written to it would go unseen; pass one whose dtype is NumPy's, by .astype() say"
        )
    if hasattr(memory, "__array_interface__") or hasattr(memory, "__array__"):
        # Twice, both alive: a copy lies somewhere else each time.
        lent, again = np.asarray(memory), np.asarray(memory)
        if lent.nbytes and (lent.ctypes.data != again.ctypes.data or lent.strides != again.strides):
            raise ValueError(
                f"{what} is a {kind} that hands out copies of its memory, and what is written to it would go unseen; "
                "pass what holds its values: one column, .to_numpy(copy=False), or its buffers"
            )
        return lent
    raise TypeError(f"{what} is {kind}, which has no memory of its own; {_WAYS}")


def _plain_tensor(torch: Any, tensor: Any) -> Any:
    """Return a tensor over the same memory that numpy can have, where there is one."""
    tensor = tensor.detach()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    try:
        np.from_dlpack(tensor[:0] if tensor.ndim else tensor)
    except (BufferError, RuntimeError, TypeError):
        # bfloat16 say: as integers of its size. Lazily negated or conjugated bits refuse that too.
        if tensor.device.type == "cpu" and tensor.element_size() in integers:
            try:
                return tensor.view(integers[tensor.element_size()])
            except RuntimeError:
                return tensor
    return tensor
