"""Migrate memory to another machine: a snapshot, a checkpoint, or a process's while it runs.

Start ``dirtylog migrate receive`` first; it says where it listens. Then ``dirtylog
migrate send ADDRESS`` sends what --snapshot, --checkpoint or --pid names; a process
is held still for the last round. With --demo, threads write into memory meanwhile.
An address that others can reach needs certificates: --tls-cert, --tls-key, --tls-ca.
With --postcopy at both ends the copy may run before it has everything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from dirtylog.commands._arrivals import add_arrivals, arrays_of, arrival_of, digest_of, nbytes_of, program_of
from dirtylog.commands._numbers import LONGEST, at_least, more_than
from dirtylog.commands._origins import add_origins, origin_of
from dirtylog.commands._postcopy import Times, add_postcopy_receive, add_postcopy_send, check_pages, check_postcopy
from dirtylog.commands._refusal import refusing

if TYPE_CHECKING:
    import socket
    import subprocess

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
    send = ends.add_parser("send", help="send a snapshot, a checkpoint, or the memory of a process while it runs")
    send.add_argument("address", type=_address, metavar="HOST:PORT", help="where 'migrate receive' listens; unix:PATH")
    add_origins(send)
    send.add_argument(
        "--downtime", type=at_least(0, float), default=0.3, metavar="SECONDS", help="pause that is allowed (0.3)"
    )
    send.add_argument(
        "--max-rounds", type=at_least(1, int), default=30, metavar="N", help="live rounds before giving up (30)"
    )
    send.add_argument("--force", action="store_true", help="then pause and send the rest, however long it takes")
    add_postcopy_send(send)
    send.add_argument("--compress", action="store_true", help="with zstd")
    send.add_argument("--channels", type=at_least(1, int), default=1, metavar="N", help="connections side by side (1)")
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
    add_arrivals(receive)
    add_postcopy_receive(receive)
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
    from dirtylog.sinks.migrate import Keys

    with refusing(" (--tls-cert, --tls-key, --tls-ca, --token-file, --insecure)"):
        yield Keys.from_files(
            cert=args.tls_cert,
            key=args.tls_key,
            ca=args.tls_ca,
            name=args.tls_name,
            psk_file=args.tls_psk_file,
            token_file=args.token_file,
        )


@contextmanager
def _named(what: str, way_out: str) -> Iterator[None]:
    """Put the address and the way out into an error of a socket, whose own message has neither."""
    try:
        yield
    except OSError as error:
        text = f"{what}: {error.strerror or error}; {way_out}"
        raise (type(error)(text) if error.errno is None else type(error)(error.errno, text)) from error


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

    from dirtylog.sinks.migrate import settle, status

    with refusing():
        found = status(args.session, journal=args.journal)
        if args.end == "settle" and found.may_run is None:
            with _connect(args) as sock:
                found = settle(sock, args.session, journal=args.journal)
    return {**asdict(found), "may_run": found.may_run, "advice": found.advice}


def _connect(args: argparse.Namespace) -> socket.socket:
    from dirtylog.sinks.migrate import connect

    way_out = "start 'dirtylog migrate receive' first, and give the address and the keys that fit"
    with _named(_shown(args.address), way_out), _keys(args) as keys:
        return connect(args.address, keys, insecure=args.insecure, timeout=args.timeout)


def _send(args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from dirtylog.sinks.migrate import Control, MigrationError, Policy, send

    check_postcopy(args)
    with refusing():
        policy = Policy(downtime=args.downtime, max_rounds=args.max_rounds, force=args.force)
    with origin_of(args) as origin, ExitStack() as line:
        check_pages(args, origin.observer.page_size)
        sock = line.enter_context(_connect(args))
        line.enter_context(origin.running())
        try:
            result = send(
                sock,
                origin.memory,
                origin.observer,
                state=origin.state,
                policy=policy,
                pause=origin.pause,
                resume=origin.resume,
                compress=args.compress,
                channels=args.channels,
                another=lambda: _connect(args),
                postcopy=args.postcopy,
                deadline=args.deadline,
                control=Control(args.bandwidth and args.bandwidth * (1 << 20)),
                reconnect=_reconnect(args),
                journal=args.journal,
            )
        except MigrationError as error:
            show_rounds(error.rounds, args.postcopy is not None)
            raise
        return {"backend": origin.backend, "digest": origin.digest(), **asdict(result)}


@contextmanager
def _listening(args: argparse.Namespace) -> Iterator[Listener]:
    """Listen, and say where; whoever is hung up on is named."""
    from dirtylog.commands import _terminal
    from dirtylog.sinks.migrate import Listener, ListenerProcess

    def refused(name: str, why: str) -> None:
        _terminal.show_note(f"hung up on {name}: {why}")

    with _keys(args) as keys:
        # A copy that runs may hold the GIL while it waits for a page.
        kind = ListenerProcess if args.postcopy else Listener
        listener = kind(args.listen, keys, insecure=args.insecure, timeout=args.timeout, refused=refused)
    with listener:
        _terminal.show_note(f"listening on {_shown(listener.address)}")
        yield listener


def _accept(args: argparse.Namespace, listener: Listener) -> socket.socket:
    what = f"nobody came to {_shown(listener.address)} within {args.timeout:g} s"
    with _named(what, "raise --timeout, or start the sender sooner"):
        return listener.accept(args.timeout)


def _receive(args: argparse.Namespace) -> dict[str, Any]:
    from dirtylog.commands._new_process import NewProcess
    from dirtylog.sinks.migrate import receive

    args.program = program_of(args)
    check_postcopy(args)
    seen = [0, 0]
    # The file first: a name that is taken, or a directory that cannot be written, is found before anybody comes.
    where = arrival_of(args) if args.program is None else NewProcess(args.program)
    with where as arrival, _listening(args) as listener, _accept(args, listener) as sock:
        times = Times(arrival.start)
        memory = receive(
            sock,
            out=arrival.out,
            state=arrival.take_state,
            # A copy that may run before it is complete is kept nowhere: there is nothing to do before it may.
            arrived=None if args.postcopy else arrival.arrived,
            start=times.start,
            postcopy=args.postcopy,
            run=args.when or "at-once",
            limit=args.limit << 20,
            deadline=args.deadline,
            reconnect=(lambda breaks: listener.accept(args.reconnect)) if args.reconnect else None,
            journal=args.journal,
            another=lambda: listener.accept(args.timeout),
            progress=lambda *at: seen.__setitem__(slice(None), at),
        )
        times.complete()
        # A program that was started writes by now.
        digest = None if arrival.program else digest_of(memory)
        answer = {
            "digest": digest,
            "program": arrival.program,
            "memory_bytes": nbytes_of(memory),
            "arrays": list(arrays_of(memory)),
        }
        answer |= {"rounds": seen[0], "page_bytes": seen[1], "written": arrival.path}
        return {**answer, "ran_after": times.ran, "complete_after": times.whole} if args.postcopy else answer


def show_rounds(rounds: Any, postcopy: bool = False) -> None:
    """Print what each round did, for people; with postcopy the copy runs during the last."""
    from dirtylog.commands import _terminal

    size, time = _terminal.bytes_text, _terminal.seconds_text
    columns = ["round", "pages", "zero", "sent", "time", "per second", "dirtied", "downtime"]
    last = " (postcopy)" if postcopy else " (paused)"
    rows = [
        [f"{r.number}{last if r.final else ''}", str(r.pages), str(r.zero_pages), size(r.wire_bytes),
         time(r.seconds), size(r.bandwidth), str(r.dirtied), "-" if r.final else time(r.expected_downtime)]
        for r in rounds
    ]  # fmt: skip
    if rows:
        _terminal.show_table("migration", columns, rows)


def run(args: argparse.Namespace) -> int:
    """Be one end of a migration, and print what it did."""
    from dirtylog.commands import _terminal

    answer = {"send": _send, "receive": _receive, "settle": _status, "status": _status}[args.end](args)
    # Of a program that was started with the memory, its end is the end of this, and its exit code.
    program = answer.pop("program", None)
    if args.json:
        _terminal.show_json(answer)
        return _end(program)
    if "may_run" in answer:
        print(f"{answer['end']}: {answer['stage']}: {answer['advice']}")
        return 0
    if args.end == "send":
        from dirtylog.sinks.migrate import Round

        show_rounds([Round(**each) for each in answer["rounds"]], args.postcopy is not None)
        print(f"paused for {_terminal.seconds_text(answer['downtime'])} of {_terminal.seconds_text(answer['seconds'])}")
    else:
        print(f"{_terminal.bytes_text(answer['memory_bytes'])} in {answer['rounds']} rounds")
        if args.postcopy:
            ran, whole = (_terminal.seconds_text(answer[each]) for each in ("ran_after", "complete_after"))
            print(f"the copy was let run after {ran} and complete after {whole}")
    if answer["digest"] is not None:
        print(f"digest {answer['digest']}")
    return _end(program)


def _end(program: subprocess.Popen[bytes] | None) -> int:
    """Wait for a program that was started; return what a shell says of its end: of a signal, 128 more."""
    if program is None:
        return 0
    # Before it says more itself.
    sys.stdout.flush()
    status = program.wait()
    return status if status >= 0 else 128 - status
