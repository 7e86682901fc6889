"""Run a Python program inside this process as ``python script.py args`` would, and pass on how it ends."""

from __future__ import annotations

import argparse
import atexit
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType

from dirtylog.commands._numbers import LONGEST, more_than

__all__ = ["add_script_arguments", "run_script"]


def add_script_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the program to run, and how often to look at it."""
    parser.add_argument(
        "--interval",
        type=more_than(0, float, LONGEST),
        default=1.0,
        metavar="SECONDS",
        help="time between samples (1)",
    )
    parser.add_argument("script", help="the program")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")


def run_script(script: str, args: Sequence[str], *, before: Callable[[], object], after: Callable[[], object]) -> int:
    """Run a program.

    Parameters
    ----------
    script : str
        Its file.
    args : sequence of str
        Its arguments.
    before, after : callable
        Called when the program is compiled and about to run, and, if it ran, when
        its main thread and all threads that an interpreter waits for have ended.

    Returns
    -------
    int
        0, or 1 after an exception, whose traceback the program's own
        `sys.excepthook` has printed.

    Raises
    ------
    OSError
        The file cannot be read.
    SystemExit
        The program raised it: for the interpreter to deal with as ever.

    Notes
    -----
    ``__main__``, ``sys.argv`` and ``sys.path[0]`` are the program's, and stay
    so: functions that run at exit find them. A program ended by
    KeyboardInterrupt ends the process by SIGINT, as the interpreter does.
    """
    with io.open_code(os.path.abspath(script)) as file:
        source = file.read()
    main = ModuleType("__main__")
    loader = SourceFileLoader("__main__", os.path.abspath(script))
    main.__dict__.update(
        __file__=os.path.abspath(script),
        __builtins__=sys.modules["builtins"],
        __loader__=loader,
        __spec__=None,
        __cached__=None,
        __annotations__={},
    )
    sys.argv[:] = [script, *args]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    sys.modules["__main__"] = main
    interrupted: list[bool] = []
    # Registered first, so that it runs last: after all that the program registers.
    atexit.register(lambda: _die_of_interrupt() if interrupted else None)
    try:
        code = compile(source, script, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        _show(error)
        return 1
    before()
    try:
        exec(code, main.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            interrupted.append(True)
        _show(error)
        return 1
    finally:
        # The interpreter would wait for these before it ends.
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
        after()
    return 0


def _show(error: BaseException) -> None:
    """Print the traceback as the interpreter would: it begins in the program's own code."""
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    error.__traceback__ = traceback
    sys.excepthook(type(error), error, traceback)


def _die_of_interrupt() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
