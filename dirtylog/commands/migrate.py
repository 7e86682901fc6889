"""Migrate the memory of a workload that keeps writing from one process to another.

Start ``dirtylog migrate receive`` first; it says where it listens. Then ``dirtylog
migrate send ADDRESS`` runs threads that write into memory, sends it while they do,
stops them for the last round, and both ends print a digest of what they hold.
An address that others can reach needs certificates: --tls-cert, --tls-key, --tls-ca.
"""

from __future__ import annotations

import argparse
import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Self

from dirtylog.commands._numbers import LONGEST, at_least, more_than

if TYPE_CHECKING:
    import mmap
    import socket

    from dirtylog.sinks.migrate import Keys, Listener
    from dirtylog.sinks.migrate.door import Address

__all__ = ["add_arguments", "run"]


def _address(text: str) -> Address:
    """Read HOST:PORT, or unix:PATH."""
    if text.startswith("unix:") and len(text) > 5:
        return text[5:]
    host, _, port = text.rpartition(":")
    try:
        number = int(port)
    except ValueError:
        number = -1
    if not host or number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a HOST:PORT such as 127.0.0.1:4000, or unix:PATH")
    if not number < 1 << 16:
        raise argparse.ArgumentTypeError(f"port {number} is not between 0 and 65535")
    return host.removeprefix("[").removesuffix("]"), number


def _shown(address: Address) -> str:
    return f"unix:{address}" if isinstance(address, str) else f"{address[0]}:{address[1]}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands and their options."""
    ends = parser.add_subparsers(dest="end", metavar="end", required=True)
    send = ends.add_parser("send", help="run a workload, and send its memory while it runs")
    send.add_argument("address", type=_address, metavar="HOST:PORT", help="where 'migrate receive' listens; unix:PATH")
    send.add_argument("--size", type=at_least(1, int), default=64, metavar="MIB", help="memory, in MiB (64)")
    send.add_argument("--writers", type=at_least(0, int, 1024), default=2, metavar="N", help="threads that write (2)")
    send.add_argument(
        "--batch", type=at_least(1, int), default=8, metavar="PAGES", help="pages each writes every millisecond (8)"
    )
    send.add_argument(
        "--downtime", type=at_least(0, float), default=0.3, metavar="SECONDS", help="pause that is allowed (0.3)"
    )
    send.add_argument(
        "--max-rounds", type=at_least(1, int), default=30, metavar="N", help="live rounds before giving up (30)"
    )
    send.add_argument("--force", action="store_true", help="then pause and send the rest, however long it takes")
    send.add_argument("--compress", action="store_true", help="with zstd")
    send.add_argument(
        "--bandwidth", type=more_than(0, float), metavar="MIB", help="no more than so many MiB per second (no limit)"
    )
    send.add_argument(
        "--reconnect",
        type=at_least(0, int),
        default=0,
        metavar="N",
        help="come again when the line breaks, N times (0)",
    )
    receive = ends.add_parser("receive", help="wait for one migration and take it in")
    receive.add_argument(
        "--listen",
        type=_address,
        default=("127.0.0.1", 0),
        metavar="HOST:PORT",
        help="port 0: any; unix:PATH (127.0.0.1:0)",
    )
    receive.add_argument(
        "--out", metavar="FILE", help="take the memory in in a file, which appears when it is complete and on the disk"
    )
    receive.add_argument(
        "--limit", type=at_least(1, int), default=4096, metavar="MIB", help="largest memory to take in (4096)"
    )
    receive.add_argument(
        "--reconnect",
        type=more_than(0, float, LONGEST),
        metavar="SECONDS",
        help="when the line breaks, wait so long for the sender to come again (not at all)",
    )
    settle = ends.add_parser("settle", help="ask the receiver who may run, after a sender whose last words were lost")
    settle.add_argument("address", type=_address, metavar="HOST:PORT", help="where 'migrate receive' listens")
    settle.add_argument("session", help="the session, which the error named")
    status = ends.add_parser("status", help="say what a journal knows of a session")
    status.add_argument("session", help="the session, which the error named")
    for end in (settle, status):
        end.add_argument("--journal", metavar="DIR", required=True, help="that of the send or the receive")
        end.add_argument("--json", action="store_true", help="print it for a program")
    settle.add_argument("--timeout", type=more_than(0, float, LONGEST), default=30.0, metavar="SECONDS", help="(30)")
    _add_keys(settle)
    for end in (send, receive):
        end.add_argument(
            "--timeout",
            type=more_than(0, float, LONGEST),
            default=30.0,
            metavar="SECONDS",
            help="for a peer that hangs: bounds each frame (30)",
        )
        end.add_argument(
            "--deadline", type=more_than(0, float, LONGEST), metavar="SECONDS", help="for all of it (none)"
        )
        end.add_argument(
            "--journal", metavar="DIR", help="keep there who may run, for 'migrate status' and 'migrate settle'"
        )
        _add_keys(end)
        end.add_argument("--json", action="store_true", help="print the figures for a program")


def _add_keys(end: argparse.ArgumentParser) -> None:
    who = end.add_argument_group("who may talk")
    who.add_argument("--tls-cert", metavar="FILE", help="this end's certificate, PEM")
    who.add_argument("--tls-key", metavar="FILE", help="its private key, where the certificate's file has none")
    who.add_argument("--tls-ca", metavar="FILE", help="who may have signed the other end's certificate, PEM")
    who.add_argument("--tls-name", metavar="NAME", help="what the receiver's certificate is issued to (the host)")
    who.add_argument("--tls-psk-file", metavar="FILE", help="instead: a key that both ends share (Python 3.13)")
    who.add_argument("--token-file", metavar="FILE", help="a secret that both ends must hold")
    who.add_argument("--insecure", action="store_true", help="no TLS, on an address that others can reach")


@contextmanager
def _keys(args: argparse.Namespace) -> Iterator[Keys]:
    """Yield the keys of the command line; what is wrong with them is said in its words."""
    from dirtylog.errors import DirtyLogError
    from dirtylog.sinks.migrate import Keys

    try:
        yield Keys.from_files(
            cert=args.tls_cert,
            key=args.tls_key,
            ca=args.tls_ca,
            name=args.tls_name,
            psk_file=args.tls_psk_file,
            token_file=args.token_file,
        )
    except ValueError as error:
        raise DirtyLogError(f"{error} (--tls-cert, --tls-key, --tls-ca, --token-file, --insecure)") from error


@contextmanager
def _named(what: str, way_out: str) -> Iterator[None]:
    """Put the address and the way out into an error of a socket, whose own message has neither."""
    try:
        yield
    except OSError as error:
        text = f"{what}: {error.strerror or error}; {way_out}"
        raise (type(error)(text) if error.errno is None else type(error)(error.errno, text)) from error


def _digest(memory: Any) -> str:
    """Say in 32 digits what some memory holds."""
    from hashlib import blake2b

    from dirtylog._bits.flat import flat_bytes

    return blake2b(flat_bytes(memory), digest_size=16).hexdigest()


def _reconnect(args: argparse.Namespace) -> Callable[[int], socket.socket] | None:
    """Return what comes again when the line breaks, a bounded number of times."""
    from dirtylog.commands import _terminal

    def reconnect(breaks: int) -> socket.socket:
        if breaks > args.reconnect:
            raise ConnectionError(f"the line broke {breaks} times, --reconnect allows {args.reconnect}; raise it")
        _terminal.show_note(f"the line broke; connecting again ({breaks} of {args.reconnect})")
        return _connect(args)

    return reconnect if args.reconnect else None


def _status(args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from dirtylog.errors import DirtyLogError
    from dirtylog.sinks.migrate import settle, status

    try:
        found = status(args.session, journal=args.journal)
        if args.end == "settle" and found.may_run is None:
            with _connect(args) as sock:
                found = settle(sock, args.session, journal=args.journal)
    except (KeyError, ValueError) as error:
        raise DirtyLogError(str(error.args[0])) from error
    return {**asdict(found), "may_run": found.may_run, "advice": found.advice}


def _connect(args: argparse.Namespace) -> socket.socket:
    from dirtylog.sinks.migrate import connect

    way_out = "start 'dirtylog migrate receive' first, and give the address and the keys that fit"
    with _named(_shown(args.address), way_out), _keys(args) as keys:
        return connect(args.address, keys, insecure=args.insecure, timeout=args.timeout)


def _send(args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    import numpy as np

    import dirtylog as dl
    from dirtylog.commands._writers import Writers
    from dirtylog.sinks.migrate import Control, MigrationError, Policy, send

    try:
        policy = Policy(downtime=args.downtime, max_rounds=args.max_rounds, force=args.force)
        memory: Any = dl.zeros(((args.size << 20) // 4096, 4096), dtype=np.uint8)
    except ValueError as error:
        raise dl.DirtyLogError(str(error)) from error
    memory[: len(memory) // 2] = np.arange(4096) % 251

    def write(writer: int, pages: Any) -> None:
        memory[pages, writer] += 1

    log = dl.DirtyLog()
    with dl.track(memory) as tracker, _connect(args) as sock:
        log.attach(tracker)
        observer = log.observer("migration")
        with Writers(write, args.writers, len(memory), args.batch, 0.001) as writers:
            try:
                result = send(
                    sock,
                    memory,
                    observer,
                    policy=policy,
                    pause=writers.stop,
                    compress=args.compress,
                    deadline=args.deadline,
                    control=Control(args.bandwidth and args.bandwidth * (1 << 20)),
                    reconnect=_reconnect(args),
                    journal=args.journal,
                )
            except MigrationError as error:
                show_rounds(error.rounds)
                raise
        return {"backend": tracker.backend, "digest": _digest(memory), **asdict(result)}


class _OutFile:
    """A file that memory arrives in, under a name of its own until the copy has the right to run.

    A context manager: what is of no use is removed. What is complete stays, under whichever name it has.
    """

    def __init__(self, path: str) -> None:
        import os
        import secrets

        self.path = path
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "there is a file of that name; remove it or choose another", path)
        directory, name = os.path.split(path)
        self.part = os.path.join(directory, f".{name}.{secrets.token_hex(8)}.part")
        self.directory = directory or "."
        self.descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.keep = False

    def reserve(self, nbytes: int) -> mmap.mmap:
        """Map so many bytes whose place on the disk is certain: a full disk is an error now, not SIGBUS later."""
        import mmap
        import os

        try:
            os.posix_fallocate(self.descriptor, 0, nbytes)
        except OSError as error:
            raise OSError(error.errno, f"{nbytes} bytes cannot be reserved: {error.strerror}", self.path) from None
        return mmap.mmap(self.descriptor, nbytes)

    def sync(self, memory: mmap.mmap) -> None:
        """Make it durable, and its own name too."""
        import os

        memory.flush()
        os.fsync(self.descriptor)
        self._sync_directory()

    def publish(self, memory: mmap.mmap) -> None:
        """Give it its name; a file that has come to be there meanwhile is not replaced."""
        import os

        # The only copy that has the right to run: whatever fails from here on, it stays.
        self.keep = True
        try:
            os.link(self.part, self.path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                error.add_note(f"the memory is complete, in {self.part}")
                raise
            # A file system without hard links.
            os.rename(self.part, self.path)
        self.keep = False
        self._sync_directory()

    def _sync_directory(self) -> None:
        import os

        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        import os

        if getattr(error, "uncertain", False):
            self.keep = True
            if error is not None:
                error.add_note(f"the memory is in {self.part}")
        if not self.keep:
            with suppress(FileNotFoundError):
                os.unlink(self.part)
        os.close(self.descriptor)


@contextmanager
def _listening(args: argparse.Namespace) -> Iterator[Listener]:
    """Listen, and say where; whoever is hung up on is named."""
    from dirtylog.commands import _terminal
    from dirtylog.sinks.migrate import Listener

    def refused(name: str, why: str) -> None:
        _terminal.show_note(f"hung up on {name}: {why}")

    with _keys(args) as keys:
        listener = Listener(args.listen, keys, insecure=args.insecure, timeout=args.timeout, refused=refused)
    with listener:
        _terminal.show_note(f"listening on {_shown(listener.address)}")
        yield listener


def _accept(args: argparse.Namespace, listener: Listener) -> socket.socket:
    what = f"nobody came to {_shown(listener.address)} within {args.timeout:g} s"
    with _named(what, "raise --timeout, or start the sender sooner"):
        return listener.accept(args.timeout)


def _receive(args: argparse.Namespace) -> dict[str, Any]:
    from dirtylog._bits.flat import flat_bytes
    from dirtylog.sinks.migrate import receive

    seen = [0, 0]
    # The file first: a name that is taken, or a directory that cannot be written, is found before anybody comes.
    with (
        _OutFile(args.out) if args.out else nullcontext() as out,
        _listening(args) as listener,
        _accept(args, listener) as sock,
    ):
        memory = receive(
            sock,
            out=out.reserve if out else None,
            arrived=out.sync if out else None,
            start=out.publish if out else None,
            limit=args.limit << 20,
            deadline=args.deadline,
            reconnect=(lambda breaks: listener.accept(args.reconnect)) if args.reconnect else None,
            journal=args.journal,
            progress=lambda *at: seen.__setitem__(slice(None), at),
        )
        nbytes = flat_bytes(memory).nbytes
        return {"digest": _digest(memory), "memory_bytes": nbytes, "rounds": seen[0], "page_bytes": seen[1]}


def show_rounds(rounds: Any) -> None:
    """Print what each round did, for people."""
    from dirtylog.commands import _terminal

    size, time = _terminal.bytes_text, _terminal.seconds_text
    columns = ["round", "pages", "zero", "sent", "time", "per second", "dirtied", "downtime"]
    rows = [
        [f"{r.number}{' (paused)' if r.final else ''}", str(r.pages), str(r.zero_pages), size(r.wire_bytes),
         time(r.seconds), size(r.bandwidth), str(r.dirtied), "-" if r.final else time(r.expected_downtime)]
        for r in rounds
    ]  # fmt: skip
    if rows:
        _terminal.show_table("migration", columns, rows)


def run(args: argparse.Namespace) -> int:
    """Be one end of a migration, and print what it did."""
    from dirtylog.commands import _terminal

    answer = {"send": _send, "receive": _receive, "settle": _status, "status": _status}[args.end](args)
    if args.json:
        _terminal.show_json(answer)
        return 0
    if "may_run" in answer:
        print(f"{answer['end']}: {answer['stage']}: {answer['advice']}")
        return 0
    if args.end == "send":
        from dirtylog.sinks.migrate import Round

        show_rounds([Round(**each) for each in answer["rounds"]])
        print(f"paused for {_terminal.seconds_text(answer['downtime'])} of {_terminal.seconds_text(answer['seconds'])}")
    else:
        print(f"{_terminal.bytes_text(answer['memory_bytes'])} in {answer['rounds']} rounds")
    print(f"digest {answer['digest']}")
    return 0
