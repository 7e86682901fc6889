"""The command line: finds the command, runs it, and turns what went wrong into an exit code.

A command is a module of `dirtylog.commands` named in `COMMANDS`. The first line
of its docstring is its help, ``add_arguments(parser)`` declares its options, and
``run(args)`` does the work and returns the exit code. What a command needs beyond
`dirtylog` itself it imports in ``run``, so that ``--help`` stays quick.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TextIO

import dirtylog
from dirtylog.commands._refusal import Misunderstood

__all__ = ["COMMANDS", "EXIT_CODES", "FAILED", "UNAVAILABLE", "main"]

COMMANDS = (
    "demo",
    "info",
    "profile",
    "record",
    "rate",
    "report",
    "top",
    "snapshot",
    "checkpoint",
    "backup",
    "migrate",
    "bench",
)

FAILED = 1
MISUNDERSTOOD = 2
UNAVAILABLE = 3
INTERRUPTED = 130
EXIT_CODES = """\
exit codes:
  0    done
  1    failed: the message says what, and what to do about it
  2    the command line was not understood
  3    this machine lacks a facility that the command needs
  130  interrupted
"""


def _complain(text: str) -> None:
    """Print an error; the names in it may be anybody's."""
    from dirtylog.commands._terminal import printable

    print(f"dirtylog: {printable(text, keep=chr(10))}", file=sys.stderr)


def _nobody_reads(stream: TextIO) -> bool:
    """Tell whether a stream is a pipe whose reader has gone."""
    try:
        waiting = select.poll()
        waiting.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in waiting.poll(0))
    except (OSError, ValueError):
        return False


def parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """Build the parser: one sub-command for each of these modules of `COMMANDS`."""
    top = argparse.ArgumentParser(
        prog="dirtylog",
        description="Which pages of memory were written since I last looked?",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"dirtylog {dirtylog.__version__}")
    commands = top.add_subparsers(metavar="command", required=True)
    for name in names:
        module = import_module(f"dirtylog.commands.{name}")
        description = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=description.partition("\n")[0],
            description=description,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        The words after ``dirtylog``; those of this process if left out.

    Returns
    -------
    int
        The exit code: see `EXIT_CODES`.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        # A command that is named comes first; what the others import would make it wait.
        args = parser([word for word in words[:1] if word in COMMANDS] or COMMANDS).parse_args(words)
        if sys.stdout is None:  # Python's way to say that it was started with standard output closed
            if sys.stderr is not None:
                said = "standard output is closed; redirect it to /dev/null if it is not wanted"
                print(f"dirtylog: {said}", file=sys.stderr)
            return FAILED
        code: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError as error:
        if not _nobody_reads(sys.stdout):
            _complain(str(error))  # a line to somebody else
            return FAILED
        # The reader (head, less) has seen enough. What is still buffered has
        # nowhere to go: without this, the interpreter would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except dirtylog.BackendUnavailable as error:
        _complain(str(error))
        return UNAVAILABLE
    except Misunderstood as error:
        _complain(str(error))
        return MISUNDERSTOOD
    except (dirtylog.DirtyLogError, OSError, MemoryError) as error:
        _complain(str(error) or type(error).__name__)
        return FAILED
    return code
