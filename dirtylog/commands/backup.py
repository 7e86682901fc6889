"""Back up the disk of a running VM, as chains of snapshots: full once, then what QEMU's dirty bitmaps name.

The VM is not paused, and nothing is installed in it. QEMU, or qemu-storage-daemon, needs a
monitor (-qmp unix:PATH,server=on,wait=off); bitmaps outlive it if the disk is qcow2.

Backups are files in a directory, or, with --store URL, commits of an Icechunk store.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import Any

from dirtylog.commands import _stored
from dirtylog.commands._stored import add_store_arguments, check_place

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands and their options."""
    commands = parser.add_subparsers(dest="action", metavar="action", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        command.add_argument("directory", nargs="?", help="where the backups of this disk are")
        add_store_arguments(command)
        command.add_argument("--json", action="store_true", help="print the answer for a program")
        return command

    save = action("save", "copy what was written since the last backup; all of it, the first time")
    save.add_argument("--qmp", required=True, metavar="ADDRESS", help="QEMU's monitor: a Unix socket, or HOST:PORT")
    save.add_argument("--node", required=True, help="node name of the disk (see query-named-block-nodes)")
    save.add_argument("--nbd", metavar="ADDRESS", help="QEMU's NBD server, if it has one already")
    save.add_argument("--full", action="store_true", help="copy all of it, and begin a new chain")
    save.add_argument(
        "--granularity", type=int, metavar="BYTES", help="bytes of a page: 65536, or that of the chain there is"
    )
    save.add_argument(
        "--no-moment", action="store_true", help="copy pages as they are when they are reached, without a scratch file"
    )
    save.add_argument("--no-sync", action="store_true", help="do not wait for the disk")
    save.add_argument(
        "--chunk", type=int, metavar="BYTES", help="with --store: bytes of a chunk, of which all is written (65536)"
    )
    save.add_argument("--scratch", metavar="DIR", help="with --store: where QEMU makes its scratch file ($TMPDIR)")
    action("list", "say which backups there are, oldest first")
    action("verify", "check every byte of all backups")
    restore = action("restore", "write the disk of a backup to an image")
    restore.add_argument("image", help="file to write; it must not exist")
    restore.add_argument("--backup", metavar="NAME", help="which one, as list names it (the newest)")
    restore.add_argument("--format", default="raw", help="raw (default), or what qemu-img makes: qcow2, ...")
    prune = action("prune", "remove all backups but those to keep, and merge what these need")
    prune.add_argument("--keep-last", type=int, metavar="N", help="keep the newest N")
    prune.add_argument("--keep-daily", type=int, metavar="N", help="keep the newest of each of the last N days")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be done")


def _save(args: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    from dirtylog.commands import _terminal
    from dirtylog.commands._bar import byte_bar
    from dirtylog.commands._monitor import address
    from dirtylog.sinks.snapshot.disks import back_up
    from dirtylog.sources.qemu import Qmp

    with Qmp(address(args.qmp)) as qmp, byte_bar("backup save") as progress:
        done = back_up(
            args.directory, qmp, args.node, full=args.full, granularity=args.granularity, moment=not args.no_moment,
            nbd=args.nbd and address(args.nbd), sync=not args.no_sync, progress=progress,
        )  # fmt: skip
    about = done.info
    rows = [
        ("backup", about.path),
        ("kind", f"full: {done.why_full}" if done.why_full else f"what was written since {about.parent}"),
        ("disk", f"{_terminal.bytes_text(about.nbytes)}, pages of {_terminal.bytes_text(about.page_size)}"),
        ("holds", f"{about.count} of {about.npages} pages; {_terminal.bytes_text(about.allocated)} on disk"),
        ("content", "as it is at different moments" if args.no_moment else "of one moment, as after a power cut"),
    ]
    return {**asdict(about), "why_full": done.why_full}, rows


def _restore(args: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    from dirtylog.commands import _terminal
    from dirtylog.commands._bar import byte_bar
    from dirtylog.sinks.snapshot.disks import restore_disk

    backup = args.directory if args.backup is None else os.path.join(args.directory, args.backup)
    with byte_bar("backup restore") as progress:
        about = restore_disk(backup, args.image, format=args.format, progress=progress)
    rows = [
        ("image", f"{os.path.abspath(args.image)} ({args.format})"),
        ("backup", f"{about.path}, of {_terminal.time_text(about.time)}"),
        ("disk", _terminal.bytes_text(about.nbytes)),
    ]
    return {**asdict(about), "image": os.path.abspath(args.image), "format": args.format}, rows


def _prune(args: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    from dirtylog.commands._bar import byte_bar
    from dirtylog.sinks import snapshot

    with byte_bar("backup prune") as progress:
        done = snapshot.prune(
            args.directory, keep_last=args.keep_last, keep_daily=args.keep_daily, dry_run=args.dry_run,
            progress=progress,
        )  # fmt: skip
    gone = "would be removed" if args.dry_run else "removed"
    rows = [(os.path.basename(path), "kept") for path in done.kept]
    rows += [(os.path.basename(path), "needed by several that are kept") for path in done.needed]
    rows += [(os.path.basename(path), gone) for path in done.removed]
    return {"dry_run": args.dry_run, **asdict(done)}, rows


def _entries(args: argparse.Namespace) -> int:
    """List the backups, or verify them; 1 where one cannot be restored."""
    from dirtylog.commands import _terminal
    from dirtylog.sinks import snapshot

    rows, answers, bad = [], [], 0
    for entry in snapshot.catalog(args.directory):
        problem = entry.problem
        if problem is None and args.action == "verify":
            try:
                snapshot.verify(entry.path)
            except (snapshot.SnapshotError, OSError) as error:
                problem = str(error)
        bad += problem is not None
        about = entry.info
        state = problem.partition(": ")[2] if problem else "sound" if args.action == "verify" else "restorable"
        kind = "?" if about is None else about.kind if about.parent is None else f"{about.kind} over {about.parent}"
        rows.append(
            (
                os.path.basename(entry.path),
                kind,
                "-" if about is None else _terminal.time_text(about.time),
                "-" if about is None else _terminal.bytes_text(about.allocated),
                state,
            )
        )
        answers.append({"path": entry.path, "kind": about and about.kind, "time": about and about.time,
                        "parent": about and about.parent, "problem": problem})  # fmt: skip
    if args.json:
        _terminal.show_json({"action": args.action, "backups": answers})
    else:
        _terminal.show_table(
            os.path.abspath(args.directory), ["backup", "kind", "time", "on disk", "state"], rows, left=3
        )
    return 1 if bad else 0


def run(args: argparse.Namespace) -> int:
    """Do one action and print what came of it."""
    from dirtylog import DirtyLogError
    from dirtylog.commands import _terminal

    check_place(args)
    if args.action in ("list", "verify"):
        return _entries(args) if args.store is None else _stored.entries(args)
    actions = {"save": _save, "restore": _restore, "prune": _prune}
    if args.store is not None:
        actions = {"save": _stored.save, "restore": _stored.restore, "prune": _stored.prune}
    try:
        answer, rows = actions[args.action](args)
    except ValueError as error:
        hint = " (--keep-last N, --keep-daily N)" if args.action == "prune" else ""
        raise DirtyLogError(f"{error}{hint}") from error
    if args.json:
        _terminal.show_json({"action": args.action, **answer})
    else:
        _terminal.show_table(args.action, ["", "value"], rows or [("none", "")], left=2)
    return 0
