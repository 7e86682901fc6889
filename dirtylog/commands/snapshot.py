"""Keep memory images as chains of sparse snapshots: save, diff, restore, verify, list, prune, merge.

An image is a file that holds memory, every page at its own offset. A diff holds the
pages that differ from its parent, or those that a dirty bitmap names. With --pid, the
memory is that of a running process: memory, not registers.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import Any

from dirtylog.commands._monitor import add_guest_argument, guest_at

__all__ = ["add_arguments", "run"]

PAGE_SIZE = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands and their options."""
    commands = parser.add_subparsers(dest="action", metavar="action", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print the answer for a program")
        return command

    def writes(command: argparse.ArgumentParser) -> None:
        command.add_argument("--no-sync", action="store_true", help="do not wait for the disk")

    save = action("save", "write a full snapshot of an image; zero pages become holes")
    save.add_argument("snapshot", help="the file to write")
    save.add_argument("image", nargs="?", help="file that holds the memory")
    save.add_argument("--page-size", type=int, default=PAGE_SIZE, metavar="BYTES", help="bytes of a page (4096)")
    diff = action("diff", "write what differs between an image and a snapshot")
    diff.add_argument("snapshot", help="the file to write, in the parent's directory")
    diff.add_argument("image", nargs="?", help="file that holds the memory")
    diff.add_argument("--parent", required=True, help="snapshot that the diff is taken over")
    diff.add_argument(
        "--bitmap", metavar="FILE", help="dirty bitmap (little-endian words) to believe instead of comparing every page"
    )
    for command in (save, diff):
        command.add_argument("--pid", type=int, help="the memory of this running process, instead of an image")
        command.add_argument(
            "--freeze",
            nargs="?",
            const="ptrace",
            choices=("ptrace", "cgroup"),
            help="hold the process still meanwhile: it alone (ptrace), or all of its control group (cgroup)",
        )
        command.add_argument(
            "--select",
            choices=("all", "large", "guest"),
            help="which of its memory: all that is writable (default), mappings of 1 MiB and more, or a guest's RAM",
        )
        add_guest_argument(command)
        command.add_argument("--epoch", type=int, metavar="N", help="epoch number to note")
        command.add_argument("--replace", action="store_true", help="take the place of a snapshot of that name")
        writes(command)
    restore = action("restore", "write the memory of a snapshot, and of its chain, to an image")
    restore.add_argument("snapshot")
    restore.add_argument("image", help="file to write; it must not exist")
    rebase = action("rebase", "lay a diff over the snapshot it was taken over")
    rebase.add_argument("base", help="full snapshot or diff; holds the diff's memory afterwards")
    rebase.add_argument("snapshot", help="the diff")
    rebase.add_argument(
        "--orphan", action="store_true", help="go on although other diffs of the base can then not be restored"
    )
    writes(rebase)
    for name, text in (("verify", "check every byte of a snapshot's chain"), ("info", "say what a snapshot is")):
        action(name, text).add_argument("snapshot")
    flatten = action("flatten", "make a diff a full snapshot in place; the diffs over it restore as before")
    flatten.add_argument("snapshot", help="the diff")
    writes(flatten)
    merge = action("merge", "make one diff of a piece of a chain; the newest of each page wins")
    merge.add_argument("first", help="the oldest of the piece; if it is full, the result is")
    merge.add_argument("snapshot", metavar="last", help="the newest of the piece, which takes in the others")
    merge.add_argument("--keep", action="store_true", help="leave the others where they are")
    writes(merge)
    directories: dict[str, str] = {
        "list": "say which snapshots a directory has, oldest first",
        "tree": "show which snapshot hangs on which",
        "prune": "remove all snapshots but those to keep, and merge what these need",
        "clean": "remove the unfinished files of writers that are dead",
    }
    for name, text in directories.items():
        command = action(name, text)
        command.add_argument("directory", nargs="?", default=".")
        if name in ("prune", "clean"):
            command.add_argument("--dry-run", action="store_true", help="only say what would be done")
        if name == "prune":
            command.add_argument("--keep-last", type=int, metavar="N", help="keep the newest N")
            command.add_argument(
                "--keep-daily", type=int, metavar="N", help="keep the newest of each of the last N days"
            )
            command.add_argument(
                "--patience", type=float, default=10.0, metavar="SECONDS", help="how long to wait for writers (10)"
            )
            writes(command)
        if name == "clean":
            command.add_argument(
                "--elsewhere", action="store_true", help="those of writers on other machines too: none may be alive"
            )


def _check_origin(args: argparse.Namespace) -> None:
    """Refuse options that do not go with where the memory comes from."""
    from dirtylog.commands._refusal import Misunderstood

    if (args.image is None) == (args.pid is None):
        raise Misunderstood("name an image, or a running process by --pid: one of them")
    given = [f"--{name}" for name in ("freeze", "select", "qmp") if getattr(args, name) is not None]
    if args.pid is None and given:
        raise Misunderstood(f"{given[0]} is about a running process; name one by --pid")
    if args.qmp is not None and args.select is not None:
        raise Misunderstood("--qmp names a guest's memory alone; leave out --select")
    if args.pid is not None and args.action == "diff" and args.bitmap is not None:
        raise Misunderstood("--bitmap is about an image; the memory of a process is compared with the parent")
    if args.pid is not None and args.action == "save" and args.page_size != PAGE_SIZE:
        raise Misunderstood("--page-size is about an image; a process has the pages of the system")


def _act_on_process(args: argparse.Namespace, progress: Any) -> Any:
    from dirtylog.sinks.snapshot.processes import diff_process, save_process

    how = {
        "select": guest_at(args.qmp) if args.qmp is not None else args.select or "all",
        "freeze": args.freeze, "epoch": args.epoch,
        "sync": not args.no_sync, "replace": args.replace, "progress": progress,
    }  # fmt: skip
    if args.action == "save":
        return save_process(args.snapshot, args.pid, **how)
    return diff_process(args.snapshot, args.pid, parent=args.parent, **how)


def _act(args: argparse.Namespace, progress: Any) -> Any:
    from dirtylog.sinks import snapshot
    from dirtylog.sinks.snapshot import images

    if args.action in ("save", "diff"):
        _check_origin(args)
        if args.pid is not None:
            return _act_on_process(args, progress)
    match args.action:
        case "save":
            return images.save_image(
                args.snapshot, args.image, page_size=args.page_size, epoch=args.epoch, sync=not args.no_sync,
                replace=args.replace, progress=progress,
            )  # fmt: skip
        case "diff":
            return images.diff_image(
                args.snapshot, args.image, parent=args.parent, bitmap=args.bitmap, epoch=args.epoch,
                sync=not args.no_sync, replace=args.replace, progress=progress,
            )  # fmt: skip
        case "restore":
            return images.restore_image(args.snapshot, args.image, progress=progress)
        case "rebase":
            return snapshot.rebase(
                args.base, args.snapshot, orphan=args.orphan, sync=not args.no_sync, progress=progress
            )
        case "flatten":
            return snapshot.flatten(args.snapshot, sync=not args.no_sync, progress=progress)
        case "merge":
            return snapshot.merge(args.first, args.snapshot, keep=args.keep, sync=not args.no_sync, progress=progress)
        case "verify":
            return snapshot.verify(args.snapshot, progress=progress)
        case _:
            return snapshot.info(args.snapshot)


def _clean(args: argparse.Namespace) -> int:
    """Remove what dead writers left in a directory."""
    from dirtylog.commands import _terminal
    from dirtylog.sinks import snapshot

    removed = snapshot.clean(args.directory, elsewhere=args.elsewhere, dry_run=args.dry_run)
    if args.json:
        _terminal.show_json({"action": "clean", "dry_run": args.dry_run, "removed": removed})
    else:
        rows = [(path,) for path in removed] or [("nothing",)]
        _terminal.show_table("clean", ["would be removed" if args.dry_run else "removed"], rows, left=1)
    return 0


def _list(args: argparse.Namespace) -> int:
    """Show what a directory has, as a list or as a tree."""
    from dirtylog.commands import _terminal
    from dirtylog.sinks import snapshot

    entries = snapshot.catalog(args.directory)
    if args.json:
        _terminal.show_json({"action": args.action, "snapshots": [asdict(entry) for entry in entries]})
        return 0
    if args.action == "tree":
        by_path = {entry.path: entry for entry in entries}
        rows = []
        # Parents before their children, without a frame for each: a chain may be long.
        waiting = [(entry, "") for entry in reversed(entries) if entry.parent not in by_path]
        while waiting:
            entry, above = waiting.pop()
            rows.append((above + os.path.basename(entry.path), entry))
            # A line of diffs is no deeper than its first: only where it divides does it move to the right.
            below = above if len(entry.children) == 1 else above + "  "
            waiting += [(by_path[path], below) for path in reversed(entry.children) if path in by_path]
    else:
        rows = [(os.path.basename(entry.path), entry) for entry in entries]
    _terminal.show_table(
        os.path.abspath(args.directory),
        ["snapshot", "kind", "over", "time", "pages", "on disk", "state"],
        [
            (
                name,
                entry.info.kind if entry.info else "?",
                (entry.info and entry.info.parent) or "-",
                _terminal.time_text(entry.info.time) if entry.info else "-",
                str(entry.info.count) if entry.info else "-",
                _terminal.bytes_text(entry.info.allocated) if entry.info else "-",
                "restorable" if entry.problem is None else f"damaged: {entry.problem.partition(': ')[2]}",
            )
            for name, entry in rows
        ],
        left=4,
    )
    return 0


def _prune(args: argparse.Namespace) -> int:
    """Remove what is not to be kept."""
    from dirtylog.commands import _terminal
    from dirtylog.commands._bar import byte_bar
    from dirtylog.commands._refusal import refusing
    from dirtylog.sinks import snapshot

    hint = " (--keep-last N, --keep-daily N)" if args.keep_last is None and args.keep_daily is None else ""
    with refusing(hint), byte_bar("snapshot prune") as progress:
        done = snapshot.prune(
            args.directory, keep_last=args.keep_last, keep_daily=args.keep_daily, dry_run=args.dry_run,
            sync=not args.no_sync, patience=args.patience, progress=progress,
        )  # fmt: skip
    if args.json:
        _terminal.show_json({"action": "prune", "dry_run": args.dry_run, **asdict(done)})
        return 0
    rows = [
        *(
            (os.path.basename(path), "kept, took in what it needs" if path in done.merged else "kept")
            for path in done.kept
        ),
        *((os.path.basename(path), "needed by several that are kept") for path in done.needed),
        *((os.path.basename(path), "would be removed" if args.dry_run else "removed") for path in done.removed),
    ]
    _terminal.show_table(os.path.abspath(args.directory), ["snapshot", "prune"], rows or [("none", "")], left=2)
    return 0


def _of_process(about: Any) -> list[tuple[str, str]]:
    """Say plainly what a snapshot of a process is of, and what it is not."""
    from dirtylog.commands import _terminal
    from dirtylog.sinks.snapshot.processes import HOLDS, process_of

    known = process_of(about)
    if known is None:
        return []
    process, regions = known
    mapped = _terminal.bytes_text(sum(region.npages for region in regions) * about.page_size)
    paused = process.get("paused")
    moment = f"of one moment: it was paused by {paused}" if paused else "of different moments: it ran on meanwhile"
    return [
        ("process", f"{process.get('pid')} ({process.get('command')}), {len(regions)} regions of {mapped}"),
        ("content", f"{HOLDS}; {moment}"),
    ]


def run(args: argparse.Namespace) -> int:
    """Do one action and print the snapshot it is about."""
    from dirtylog.commands import _terminal
    from dirtylog.commands._bar import byte_bar
    from dirtylog.commands._refusal import refusing

    others = {"clean": _clean, "list": _list, "tree": _list, "prune": _prune}
    if args.action in others:
        return others[args.action](args)
    with refusing(), byte_bar(f"snapshot {args.action}") as progress:
        about = _act(args, progress)
    if args.json:
        _terminal.show_json({"action": args.action, **asdict(about)})
        return 0
    pages = _terminal.pages_text
    sure = "" if about.exact else ", some of them perhaps clean"
    rows = [
        ("snapshot", about.path),
        ("kind", about.kind if about.parent is None else f"{about.kind} over {about.parent}"),
        ("memory", f"{_terminal.bytes_text(about.nbytes)}, {pages(about.npages)} of {about.page_size} B"),
        ("holds", f"{pages(about.count)}{sure}; {_terminal.bytes_text(about.allocated)} on disk"),
        *_of_process(about),
        ("epoch", "-" if about.epoch is None else str(about.epoch)),
        ("digest", f"{about.digest} ({about.algorithm})"),
    ]
    _terminal.show_table({"verify": "sound"}.get(args.action, args.action), ["", "value"], rows, left=2)
    return 0
