"""Keep memory images as chains of sparse snapshots: save, diff, restore, rebase, verify, info.

An image is a file that holds memory, every page at its own offset. A diff holds the
pages that differ from its parent, or those that a dirty bitmap names.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

__all__ = ["add_arguments", "run"]


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
    save.add_argument("image", help="file that holds the memory")
    save.add_argument("--page-size", type=int, default=4096, metavar="BYTES", help="bytes of a page (4096)")
    diff = action("diff", "write what differs between an image and a snapshot")
    diff.add_argument("snapshot", help="the file to write, in the parent's directory")
    diff.add_argument("image", help="file that holds the memory")
    diff.add_argument("--parent", required=True, help="snapshot that the diff is taken over")
    diff.add_argument(
        "--bitmap", metavar="FILE", help="dirty bitmap (little-endian words) to believe instead of comparing every page"
    )
    for command in (save, diff):
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
    clean = action("clean", "remove the unfinished files of writers that are dead")
    clean.add_argument("directory", nargs="?", default=".")
    clean.add_argument(
        "--elsewhere", action="store_true", help="those of writers on other machines too: none may be alive"
    )


def _act(args: argparse.Namespace, progress: Any) -> Any:
    from dirtylog.sinks import snapshot
    from dirtylog.sinks.snapshot import images

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
        case "verify":
            return snapshot.verify(args.snapshot, progress=progress)
        case _:
            return snapshot.info(args.snapshot)


def _clean(args: argparse.Namespace) -> int:
    """Remove what dead writers left in a directory."""
    from dirtylog.commands import _terminal
    from dirtylog.sinks.snapshot import staged

    removed = staged.clean_directory(args.directory, elsewhere=args.elsewhere)
    if args.json:
        _terminal.show_json({"action": "clean", "removed": removed})
    else:
        _terminal.show_table("clean", ["removed"], [(path,) for path in removed] or [("nothing",)], left=1)
    return 0


def run(args: argparse.Namespace) -> int:
    """Do one action and print the snapshot it is about."""
    from dirtylog import DirtyLogError
    from dirtylog.commands import _terminal
    from dirtylog.commands._bar import byte_bar

    if args.action == "clean":
        return _clean(args)
    try:
        with byte_bar(f"snapshot {args.action}") as progress:
            about = _act(args, progress)
    except ValueError as error:
        raise DirtyLogError(str(error)) from error
    if args.json:
        _terminal.show_json({"action": args.action, **asdict(about)})
        return 0
    sure = "" if about.exact else ", some of them perhaps clean"
    rows = [
        ("snapshot", about.path),
        ("kind", about.kind if about.parent is None else f"{about.kind} over {about.parent}"),
        ("memory", f"{_terminal.bytes_text(about.nbytes)}, {about.npages} pages of {about.page_size} B"),
        ("holds", f"{about.count} pages{sure}; {_terminal.bytes_text(about.allocated)} on disk"),
        ("epoch", "-" if about.epoch is None else str(about.epoch)),
        ("digest", f"{about.digest} ({about.algorithm})"),
    ]
    _terminal.show_table({"verify": "sound"}.get(args.action, args.action), ["", "value"], rows, left=2)
    return 0
