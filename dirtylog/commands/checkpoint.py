"""Look into a directory or a store of checkpoints: list them, show one, export its arrays.

It is what dirtylog.Checkpoint wrote. Arrays are exported to .npy, .npz or
.zarr, by the ending of the file that you name.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import Any

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands and their options."""
    commands = parser.add_subparsers(dest="action", metavar="action", required=True)
    actions = {
        "list": "list the checkpoints that can be loaded, oldest first",
        "show": "say which arrays and which state a checkpoint holds",
        "export": "write the arrays of a checkpoint to .npy, .npz or .zarr",
    }
    for name, text in actions.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("directory", help="where the checkpoints are: a directory, or a store, s3://bucket/prefix")
        if name == "export":
            command.add_argument("target", help="what to write, with its ending; it must not exist")
            command.add_argument("--array", action="append", metavar="NAME", help="only this one; may be repeated")
        if name != "list":
            command.add_argument("--step", type=int, metavar="N", help="which one (the latest)")
        command.add_argument("--json", action="store_true", help="print the answer for a program")


def _plain(value: Any) -> Any:
    """Make a state fit for JSON: bytes become their length and first digits."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return f"<{len(value)} bytes {value[:8].hex()}{'...' if len(value) > 8 else ''}>"
    return value


def _list(args: argparse.Namespace) -> None:
    from dirtylog.commands import _terminal
    from dirtylog.sinks.checkpoint import directory
    from dirtylog.sinks.checkpoint.checkpoint import keeper

    if keeper(args.directory) is not directory:
        _list_of_store(args)
        return
    os.listdir(args.directory)  # an error if there is none
    found = directory.survey(args.directory)
    if args.json:
        kept = [
            {"step": None, "path": path, "problem": problem}
            if record is None
            else {"step": record.step, "time": record.time, **asdict(record.info), "state": None, "problem": None}
            for path, record, problem in found
        ]
        _terminal.show_json({"action": "list", "checkpoints": kept})
        return
    _terminal.show_table(
        os.path.abspath(args.directory),
        ["step", "time", "kind", "pages", "on disk", "file"],
        [
            ("?", "-", problem or "", "-", "-", os.path.basename(path))
            if record is None
            else (
                "-" if record.step is None else str(record.step),
                _terminal.time_text(record.time),
                record.info.kind,
                str(record.info.count),
                _terminal.bytes_text(record.info.allocated),
                os.path.basename(path),
            )
            for path, record, problem in found
        ]
        or [("none", "", "", "", "", "")],
        left=3,
    )


def _list_of_store(args: argparse.Namespace) -> None:
    from dirtylog.commands import _terminal
    from dirtylog.sinks.checkpoint import Checkpoint

    records = Checkpoint.history(args.directory)
    if args.json:
        kept = [
            {
                "step": record.step,
                "time": record.time,
                "snapshot": record.info.snapshot,
                "pages": record.info.pages,
                "exact": record.info.exact,
                "bytes": record.info.about.get("bytes", 0),
            }
            for record in records
        ]
        _terminal.show_json({"action": "list", "checkpoints": kept})
        return
    _terminal.show_table(
        args.directory,
        ["step", "time", "pages", "written", "snapshot"],
        [
            (
                "-" if record.step is None else str(record.step),
                _terminal.time_text(record.time),
                str(record.info.pages),
                _terminal.bytes_text(record.info.about.get("bytes", 0)),
                record.info.snapshot,
            )
            for record in records
        ]
        or [("none", "", "", "", "")],
        left=2,
    )


def _show(args: argparse.Namespace) -> None:
    import json

    from dirtylog.commands import _terminal
    from dirtylog.sinks.checkpoint import directory
    from dirtylog.sinks.checkpoint.checkpoint import keeper

    kept = keeper(args.directory)
    step, arrays, state = kept.described(args.directory, args.step)
    state = _plain(state)
    if args.json:
        names = ("name", "dtype", "shape", "nbytes")
        rows = [dict(zip(names, each, strict=True)) for each in arrays]
        where = directory.find(args.directory, args.step) if kept is directory else args.directory
        _terminal.show_json({"action": "show", "path": where, "step": step, "arrays": rows, "state": state})
        return
    _terminal.show_table(
        f"step {step}" if step is not None else "saved by the thread",
        ["array", "dtype", "shape", "size"],
        [
            (name, kind, "x".join(map(str, shape)) or "-", _terminal.bytes_text(size))
            for name, kind, shape, size in arrays
        ],
        left=2,
    )
    if state is not None:
        print(_terminal.printable(f"state: {json.dumps(state)}"))


def _export(args: argparse.Namespace) -> None:
    from dirtylog.commands import _terminal
    from dirtylog.commands._bar import byte_bar
    from dirtylog.sinks.checkpoint import export

    with byte_bar("checkpoint export") as progress:
        written = export(args.directory, args.target, args.step, names=args.array, progress=progress)
    if args.json:
        _terminal.show_json({"action": "export", "target": os.path.abspath(args.target), "arrays": written})
    else:
        _terminal.show_table(os.path.abspath(args.target), ["array"], [(name,) for name in written])


def run(args: argparse.Namespace) -> int:
    """Do one action."""
    from dirtylog.commands._refusal import refusing

    action = {"list": _list, "show": _show, "export": _export}[args.action]
    with refusing():
        action(args)
    return 0
