"""What runs inside of a process that helps: it hands a userfaultfd over, and says where its arrays are.

The standard library alone, so that it can be run by its path: a program that is started with it then has no module of
ours but this, and none that it did not import itself::

    python inside.py [--give DESCRIPTOR] [--name DESCRIPTOR] -- script.py|-m MODULE|-c CODE ARGUMENTS

Each descriptor is a connected Unix socket. Through the first, it hands over, waits for a byte before the program
begins, and says when the program's code has ended; then it waits until the other end has looked, and hangs up. Through
the second, a thread answers where the program's arrays are.
"""

from __future__ import annotations

import array
import ctypes
import errno
import gc
import json
import mmap
import os
import select
import socket
import struct
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

__all__ = ["GREETING", "MAGIC", "answer", "find_arrays", "send_descriptors", "userfaultfd"]

# What an agent says with its two descriptors, a userfaultfd and its pagemap: this, and its process id.
GREETING = struct.Struct("<8sI")
MAGIC = b"dirtylog"
REFUSED = b"refused\0"
NAMES = b"names\n"
GO = b"g"
ENDED = b"e"
LENGTH = struct.Struct("<I")
SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "ppc64le": 364, "s390x": 355}
USER_MODE_ONLY = 1
LEAST = 1 << 16
# Bounds of one walk, so that it takes a fraction of a second whatever the program holds.
MOST_OBJECTS = 100_000
MOST_ENTRIES = 10_000
DEEPEST = 8

Found = tuple[str, int, int]


def userfaultfd() -> int:
    """Return a new userfaultfd of this process.

    Raises
    ------
    OSError
        The kernel refuses it; ENOSYS: its number on this architecture is not known.
    """
    machine = os.uname().machine
    number = SYS_USERFAULTFD.get(machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"its number on {machine} is not known")
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY))
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"userfaultfd(UFFD_USER_MODE_ONLY): {errno.errorcode.get(code, code)}")
    return descriptor


def send_descriptors(connection: socket.socket) -> None:
    """Send a userfaultfd of this process, and its pagemap, through a connected Unix socket; keep neither."""
    own = [userfaultfd()]
    try:
        own.append(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", own))
        connection.sendmsg([GREETING.pack(MAGIC, os.getpid())], [rights])
    finally:
        for descriptor in own:
            os.close(descriptor)


def answer(listener: socket.socket | None, connections: list[socket.socket]) -> None:
    """Hand over to whoever connects, to this user and to root, and answer what connections ask, until both are gone."""
    owner = os.getpid()
    while os.getpid() == owner and (listener is not None or connections):
        waiting = {one.fileno(): one for one in [*([listener] if listener else []), *connections]}
        if -1 in waiting:
            return  # closed by the program
        # Not by select(), which refuses numbers above 1023: a program may have more files open than that.
        poll = select.poll()
        for number in waiting:
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll():
            one = waiting[number]
            if one is listener:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                if _is_welcome(connection) and _greet(connection):
                    connections.append(connection)
                else:
                    connection.close()
            elif not _reply(one):
                connections.remove(one)
                one.close()


def _is_welcome(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] in (0, os.geteuid())


def _greet(connection: socket.socket) -> bool:
    try:
        send_descriptors(connection)
    except OSError:
        return False
    return True


def _reply(connection: socket.socket) -> bool:
    """Answer one request; False when the other end is gone, or talks nonsense."""
    try:
        if connection.recv(len(NAMES)) != NAMES:
            return False
        began = time.thread_time()
        found: Any
        try:
            found = [find_arrays(), time.thread_time() - began]
        except Exception:  # the program goes on meanwhile, and may change what is looked at: not this time
            found = None
        text = json.dumps(found).encode()
        connection.sendall(LENGTH.pack(len(text)) + text)
    except OSError:
        return False
    return True


# ---- where the program's arrays are -------------------------------------------------------------------


def find_arrays(least: int = LEAST) -> list[Found]:
    """Return the large arrays of this process: what each is called, and the addresses where it begins and ends.

    NumPy's arrays, CPU tensors of PyTorch, `bytearray`, `array.array` and `mmap`; found in the
    variables of modules and of functions that run, in the attributes, dicts and lists that hang on
    those, and in whatever else the garbage collector knows. No code of the program is called.
    """
    found: dict[tuple[int, int], str] = {}
    seen: set[int] = set()
    kinds = _Kinds()
    waiting: deque[tuple[str, Any, int]] = deque(_roots())
    while waiting and len(seen) < MOST_OBJECTS:
        name, value, depth = waiting.popleft()
        if id(value) in seen or kinds.atom(value):
            continue
        seen.add(id(value))
        read = kinds.reader(value)
        if read is not None:
            _note(found, name, read, value, least)
        elif depth < DEEPEST:
            waiting.extend((child, held, depth + 1) for child, held in _held_by(name, value, kinds) if held is not None)
    # What hangs on nothing that has a name: many at once, because nearly none of them holds an array.
    every = gc.get_objects()
    for begin in range(0, len(every), 1000):
        some = every[begin : begin + 1000]
        if any(kinds.reader(value) for value in gc.get_referents(*some)):
            for holder in some:
                for value in gc.get_referents(holder) if holder is not waiting else ():
                    read = kinds.reader(value)
                    if read is not None and id(value) not in seen:
                        _note(found, f"{type(value).__name__} in a {type(holder).__name__}", read, value, least)
    return [(name + _site(start), start, end) for (start, end), name in found.items()]


Reader = Callable[[Any], tuple[int, int]]


def _note(found: dict[tuple[int, int], str], name: str, read: Reader, value: Any, least: int) -> None:
    try:
        start, end = read(value)
    except Exception:  # whatever a half-made array answers: it has no name then
        return
    if end - start >= least:
        found.setdefault((start, end), name)


def _roots() -> Iterator[tuple[str, Any, int]]:
    """The variables of the program itself, of functions that run, and of the other modules."""
    modules = dict(sys.modules)
    main = modules.pop("__main__", None)
    if isinstance(main, types.ModuleType):
        yield from ((name, value, 0) for name, value in list(vars(main).items()))
    own = threading.get_ident()
    for thread, frame in sys._current_frames().items():
        at: types.FrameType | None = frame if thread != own else None
        while at is not None:
            if at.f_code.co_name != "<module>":
                function = at.f_code.co_name
                yield from ((f"{function}.{name}", value, 0) for name, value in list(at.f_locals.items()))
            at = at.f_back
    for module_name, module in modules.items():
        package = module_name.partition(".")[0]
        if isinstance(module, types.ModuleType) and package not in ("numpy", "dirtylog", *sys.stdlib_module_names):
            yield from ((f"{module_name}.{name}", value, 1) for name, value in list(vars(module).items()))


_ATOMS = (int, float, complex, bool, str, bytes, type(None), type, types.ModuleType, types.FunctionType, types.CodeType)


class _Kinds:
    """What is to be done with objects of a type, found out once for each type."""

    def __init__(self) -> None:
        self._readers: dict[type, Reader | None] = {bytearray: _buffer, array.array: _buffer, mmap.mmap: _buffer}
        self._atoms: dict[type, bool] = {}
        self._slots: dict[type, list[tuple[str, Any]]] = {}
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        self._arrays = [
            (module_type, read)
            for module_type, read in (
                (getattr(numpy, "ndarray", None), _ndarray),
                (getattr(torch, "Tensor", None), _tensor),
            )
            if isinstance(module_type, type)
        ]

    def atom(self, value: Any) -> bool:
        """Whether nothing hangs on it."""
        kind = type(value)
        known = self._atoms.get(kind)
        if known is None:
            known = self._atoms[kind] = issubclass(kind, _ATOMS)
        return known

    def reader(self, value: Any) -> Reader | None:
        """What tells where an array's memory is; None for what is no array."""
        kind = type(value)
        if kind not in self._readers:
            self._readers[kind] = next((read for each, read in self._arrays if issubclass(kind, each)), None)
        return self._readers[kind]

    def slots(self, value: Any) -> list[tuple[str, Any]]:
        """The members that a type declares by ``__slots__``."""
        kind = type(value)
        if kind not in self._slots:
            self._slots[kind] = [
                (key, slot)
                for each in kind.__mro__[:-1]
                if each.__flags__ & 1 << 9  # made by a class statement
                for key, slot in list(vars(each).items())
                if type(slot) is types.MemberDescriptorType
            ]
        return self._slots[kind]


def _held_by(name: str, value: Any, kinds: _Kinds) -> Iterator[tuple[str, Any]]:
    """What hangs on an object, and what it is called."""
    kind = type(value)
    if issubclass(kind, dict):
        for index, (key, held) in enumerate(list(dict.items(value)) if len(value) <= MOST_ENTRIES else ()):
            if not kinds.atom(held):
                yield f"{name}[{key!r:.40}]" if type(key) in (str, int) else f"{name}[{index}]", held
    elif kind is list or kind is tuple:
        for index, held in enumerate(value[:MOST_ENTRIES]):
            if not kinds.atom(held):
                yield f"{name}[{index}]", held
    elif kind is set or kind is deque:
        yield from ((name, held) for held in (list(value) if len(value) <= MOST_ENTRIES else ()))
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except Exception:  # it has none, or forbids to look
        attributes = {}
    if type(attributes) is dict:
        yield from ((_attribute(name, str(key)), held) for key, held in list(attributes.items()))
    for key, slot in kinds.slots(value):
        try:
            yield _attribute(name, key), slot.__get__(value)
        except AttributeError:
            continue


def _attribute(name: str, key: str) -> str:
    """A private attribute is how something is made, not what people call it."""
    return name if key.startswith("_") else f"{name}.{key}"


def _ndarray(value: Any) -> tuple[int, int]:
    numpy = sys.modules["numpy"]
    while isinstance(value.base, numpy.ndarray):  # a view is named as what it is a view of
        value = value.base
    low = high = int(value.__array_interface__["data"][0])
    if not value.size:
        return low, low
    for length, stride in zip(value.shape, value.strides, strict=True):
        low += min(0, (length - 1) * stride)
        high += max(0, (length - 1) * stride)
    return low, high + int(value.itemsize)


def _tensor(value: Any) -> tuple[int, int]:
    if value.device.type != "cpu":
        return 0, 0
    storage = value.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _buffer(value: Any) -> tuple[int, int]:
    with memoryview(value) as exported:
        if exported.readonly or exported.nbytes < LEAST:
            return 0, 0
        start = ctypes.addressof(ctypes.c_char.from_buffer(exported))
        return start, start + exported.nbytes


def _site(address: int) -> str:
    """Where NumPy allocated memory, if `tracemalloc` was on by then: in NumPy's domain of it."""
    tracemalloc, numpy = sys.modules.get("tracemalloc"), sys.modules.get("numpy")
    if tracemalloc is None or numpy is None or not tracemalloc.is_tracing():
        return ""
    try:
        look_up = ctypes.pythonapi._PyTraceMalloc_GetTraceback
        look_up.restype, look_up.argtypes = ctypes.py_object, [ctypes.c_uint, ctypes.c_size_t]
        frames = look_up(numpy.lib.tracemalloc_domain, address)
        home = os.path.dirname(str(numpy.__file__))
        # The program's own line, where as many frames were kept.
        file, line = next((frame for frame in frames or () if not frame[0].startswith(home)), frames[0])
        return f" ({os.path.basename(file)}:{line})"
    except Exception:
        return ""


# ---- running a program with it ------------------------------------------------------------------------


def main() -> None:
    """Hand over, then be the program."""
    import runpy

    split = sys.argv.index("--")
    options = dict(zip(sys.argv[1:split:2], map(int, sys.argv[2:split:2]), strict=True))
    words = sys.argv[split + 1 :]
    owner = os.getpid()
    if "--name" in options:
        asking = _inherited(options["--name"])
        threading.Thread(target=answer, args=(None, [asking]), name="dirtylog agent", daemon=True).start()
    telling = _inherited(options["--give"]) if "--give" in options else None
    if telling is not None:
        try:
            send_descriptors(telling)
        except OSError as error:
            telling.sendall(GREETING.pack(REFUSED, error.errno or 0))
        if telling.recv(1) != GO:
            sys.exit(127)  # nobody watches: it is started in another way, or not at all
    try:
        if words[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *words[2:]], ""
            program = types.ModuleType("__main__")
            sys.modules["__main__"] = program
            exec(compile(words[1], "<string>", "exec"), vars(program))
        elif words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], os.getcwd()
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, os.path.dirname(os.path.realpath(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        if telling is not None and os.getpid() == owner:
            _say_the_end(telling)


def _inherited(descriptor: int) -> socket.socket:
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)


def _say_the_end(telling: socket.socket) -> None:
    """What was written last is lost with the memory: whoever watches looks at it now."""
    with telling, suppress(OSError):  # nobody is there any more
        telling.settimeout(10)
        telling.send(ENDED, socket.MSG_NOSIGNAL)  # the program may have chosen to be ended by SIGPIPE
        telling.recv(1)


if __name__ == "__main__":
    main()
