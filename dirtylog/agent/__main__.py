"""``python -m dirtylog.agent``: run a script that offers its memory to be watched."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from contextlib import suppress

from dirtylog import agent


def main() -> None:
    """Listen, then be the script."""
    parser = argparse.ArgumentParser(
        prog="python -m dirtylog.agent",
        description="Run a Python program that hands its userfaultfd to whoever attaches with handover=PATH.",
    )
    parser.add_argument("--socket", required=True, metavar="PATH", help="the Unix socket to listen at")
    parser.add_argument("script", help="the program")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args()
    owner = os.getpid()
    try:
        listener = agent.listen(args.socket)
    except OSError as error:
        parser.error(f"{args.socket}: {error.strerror}")
    sys.argv[:] = [args.script, *args.args]
    sys.path[0] = os.path.dirname(os.path.realpath(args.script))
    try:
        runpy.run_path(args.script, run_name="__main__")
    finally:
        listener.close()
        # A child by fork that comes here leaves the socket to its parent.
        if os.getpid() == owner:
            with suppress(FileNotFoundError):
                os.unlink(args.socket)


if __name__ == "__main__":
    main()
