"""What ``dirtylog backup --store`` does: the actions of the command on a store in place of a directory of files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dirtylog.commands._refusal import Misunderstood, refusing

if TYPE_CHECKING:
    from dirtylog.sinks.store import Version

__all__ = ["add_store_arguments", "check_place", "entries", "prune", "restore", "save"]

# Options that are about a store alone, and about files alone, and what they are where they are not given.
ITS_OWN = {"branch": None, "chunk": None, "scratch": None}
NOT_ITS_OWN = {"no_sync": False, "keep_daily": None}

Answer = tuple[dict[str, Any], list[tuple[str, str]]]


def add_store_arguments(command: argparse.ArgumentParser) -> None:
    """Declare where the store is."""
    command.add_argument(
        "--store", metavar="URL", help="in place of a directory: an Icechunk store, s3://bucket/prefix or a directory"
    )
    command.add_argument("--branch", metavar="NAME", help="with --store: its branch, one for each disk (main)")


def check_place(args: argparse.Namespace) -> None:
    """Refuse a command line that names no place, or two, or options of the other kind of place."""
    if (args.directory is None) == (args.store is None):
        raise Misunderstood("name the place of the backups: a directory, or a store by --store URL, and not both")
    for name, absent in (ITS_OWN if args.store is None else NOT_ITS_OWN).items():
        if getattr(args, name, absent) != absent:
            kind = "a store; name it by --store" if args.store is None else "a directory of backups, not a store"
            raise Misunderstood(f"--{name.replace('_', '-')} is about {kind}")


def _branch(args: argparse.Namespace) -> str:
    """Return the branch, with Icechunk told to print errors alone: it warns of each directory that is a store."""
    from dirtylog.sinks.store.branch import icechunk_package

    if "ICECHUNK_LOG" not in os.environ:
        icechunk_package().set_logs_filter("error")
    return args.branch or "main"


def save(args: argparse.Namespace) -> Answer:
    """Commit what was written since the last backup."""
    from dirtylog.commands import _terminal
    from dirtylog.commands._bar import byte_bar
    from dirtylog.commands._monitor import address
    from dirtylog.sinks.store.disks import back_up
    from dirtylog.sources.qemu import Qmp

    size = _terminal.bytes_text
    with refusing(), Qmp(address(args.qmp)) as qmp, byte_bar("backup save") as progress:
        done = back_up(
            args.store, qmp, args.node, branch=_branch(args), full=args.full, granularity=args.granularity,
            chunk=args.chunk, moment=not args.no_moment, scratch=args.scratch, nbd=args.nbd and address(args.nbd),
            progress=progress,
        )  # fmt: skip
    saved = done.saved
    rows = [
        ("backup", saved.snapshot + (" (its answer was lost; the store has it)" if saved.adopted else "")),
        ("kind", f"full: {done.why_full}" if done.why_full else "what was written since the last one"),
        ("disk", f"{size(done.size)}, pages of {size(done.page_size)}"),
        ("holds", f"{saved.pages} pages; {size(saved.nbytes)} in {saved.chunks} chunks of {size(done.chunk)}"),
        ("content", "as it is at different moments" if args.no_moment else "of one moment, as after a power cut"),
    ]
    return asdict(done), rows


def _about(version: Version) -> Mapping[str, Any]:
    return {
        "snapshot": version.snapshot,
        "time": version.time.timestamp(),
        "pages": version.pages,
        "bytes": version.about.get("bytes", 0),
        "disk": version.about["disk"],
    }


def restore(args: argparse.Namespace) -> Answer:
    """Write the disk of a backup to an image."""
    from dirtylog.commands import _terminal
    from dirtylog.commands._bar import byte_bar
    from dirtylog.sinks.store.disks import restore_disk

    with refusing(), byte_bar("backup restore") as progress:
        version = restore_disk(
            args.store, args.image, args.backup, branch=_branch(args), format=args.format, progress=progress
        )
    image = os.path.abspath(args.image)
    rows = [
        ("image", f"{image} ({args.format})"),
        ("backup", f"{version.snapshot}, of {_terminal.time_text(version.time.timestamp())}"),
        ("disk", _terminal.bytes_text(version.about["disk"]["size"])),
    ]
    return {**_about(version), "image": image, "format": args.format}, rows


def prune(args: argparse.Namespace) -> Answer:
    """Remove all backups but the newest."""
    from dirtylog.sinks.store.disks import prune as prune_backups

    if args.keep_last is None:
        raise Misunderstood("say how many to keep: --keep-last N")
    with refusing():
        removed, kept = prune_backups(args.store, args.keep_last, branch=_branch(args), dry_run=args.dry_run)
    gone = "would be removed" if args.dry_run else "removed"
    rows = [(each.snapshot, "kept") for each in kept] + [(each.snapshot, gone) for each in removed]
    return {
        "dry_run": args.dry_run,
        "removed": [each.snapshot for each in removed],
        "kept": [each.snapshot for each in kept],
    }, rows


def entries(args: argparse.Namespace) -> int:
    """List the backups, or verify them; 1 where one cannot be restored."""
    from dirtylog.commands import _terminal
    from dirtylog.commands._bar import byte_bar
    from dirtylog.sinks.snapshot import SnapshotError
    from dirtylog.sinks.store.disks import backups, verify

    rows, answers, bad = [], [], 0
    with refusing():
        found = backups(args.store, branch=_branch(args))
        for version in found:
            problem = None
            if args.action == "verify":
                try:
                    with byte_bar(f"backup verify {version.snapshot}") as progress:
                        verify(args.store, version.snapshot, branch=_branch(args), progress=progress)
                except (SnapshotError, OSError) as error:
                    problem = str(error)
            bad += problem is not None
            about = _about(version)
            rows.append(
                (
                    version.snapshot,
                    "full" if about["disk"].get("why_full") else "changes",
                    _terminal.time_text(about["time"]),
                    _terminal.bytes_text(about["bytes"]),
                    problem or ("sound" if args.action == "verify" else "restorable"),
                )
            )
            answers.append({**about, "problem": problem})
    if args.json:
        _terminal.show_json({"action": args.action, "backups": answers})
    else:
        columns = ["backup", "kind", "time", "written", "state"]
        _terminal.show_table(args.store, columns, rows or [("none", "", "", "", "")], left=3)
    return 1 if bad else 0
