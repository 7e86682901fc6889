"""Run the test suite with the extension modules built under AddressSanitizer and UndefinedBehaviorSanitizer.

``python tools/sanitize.py [--scratch DIR] [pytest arguments]``: builds a copy of the checkout, loads the sanitizer
before Python and runs pytest there. Exits with pytest's status, 1 if a sanitizer reported anything from any process
that a test started, or 2 where the compiler has no sanitizer.

ThreadSanitizer has its own program, because Python itself is not built with it: ``pytest tests/sanitize``.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import scratch

# Reports go to files: that of a process which a test starts, and whose output the test reads, must not be lost.
# UBSan's cannot (in one process with ASan, gcc's writes to standard error); it ends the process instead.
OPTIONS = {
    # Blocks come from malloc, where the sanitizer sees each of them, and not from Python's arenas.
    "PYTHONMALLOC": "malloc",
    # allocator_may_return_null: tests ask for absurd sizes and expect MemoryError, as malloc would have them.
    # handle_segv: mprotect's tracker lives on that signal, and its tests on who had it before.
    "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=1:allocator_may_return_null=1:detect_stack_use_after_return=1"
    ":handle_segv=0",
    # exitcode: Python keeps some objects until the process ends, each of them a report: exit as Python would, see
    # `reports`.
    # use_tls: where gcc 12's run-time library takes a library's thread-local block for one of glibc 2.19, it reads its
    # bounds from beside the block and crashes at exit. Nothing of ours is held by thread-local memory alone.
    "LSAN_OPTIONS": "exitcode=0:use_tls=0",
    "UBSAN_OPTIONS": "halt_on_error=1:abort_on_error=1:print_stacktrace=1",
}
# Starts pytest. The processes that tests start look for no leaks: that takes each of them as long again as importing
# numpy, and what they call the tests' own process calls as well.
PYTEST = """
import os, sys
os.environ["ASAN_OPTIONS"] += ":detect_leaks=0"
import pytest
sys.exit(pytest.main())
"""
# Said, and no error.
NO_ERROR = (
    r"WARNING: ASan is ignoring requested __asan_handle_no_return|False positive error reports may follow"
    r"|For details see https://github.com/google/sanitizers/issues/189"
)
# Programs that Python only starts, in which there is no extension module of ours, and what is about the checkout, the
# documentation and the command line: Python, which calls what other tests call with far more arguments. So do the
# orders in which a writer of snapshots may die, and what is drawn.
# Of the tests that attach to processes, those are left out whose programs import dirtylog: what is built for the
# sanitizer cannot be loaded without it, and with it a program has terabytes of shadow, all of which would be watched.
# And ASan keeps freed memory for a while, so that a judge of leaks cannot tell what grows from what waits.
NOT_HERE = (
    "tests/docs",
    "tests/formal",
    "tests/sanitize",
    "tests/test_build.py",
    "tests/test_checkout.py",
    "tests/test_facilities.py",
    "tests/test_layout.py",
    "tests/test_leaks.py",
    "tests/test_mutations.py",
    "tests/test_public_api.py",
    "tests/commands/test_checkpoint_command.py",
    "tests/commands/test_cli.py",
    "tests/commands/test_figures.py",
    "tests/commands/test_migrate_origins.py",
    "tests/commands/test_rate.py",
    "tests/fleet",
    "tests/sinks/store",
    "tests/sinks/test_backup.py",
    "tests/sinks/test_checkpoint_killed.py",
    "tests/sinks/test_migrate_cut_lines.py",
    "tests/sinks/test_plot.py",
    "tests/sinks/test_report.py",
    "tests/sinks/test_snapshot_crash.py",
    "tests/sinks/test_snapshot_neighbours.py",
    "tests/sinks/test_snapshot_power.py",
    "tests/sinks/test_snapshot_upkeep.py",
    "tests/sources/qemu",
    "tests/sources/test_process_names.py",
    "tests/sources/test_vhost.py",
    "tests/sinks/test_snapshot_process.py",
    "tests/commands/test_refused.py",
    "tests/commands/test_top.py",
)


def reports(directory: Path) -> list[str]:
    """Return what the sanitizers wrote into `directory`, of leaks only those that our own code allocated."""
    found = []
    for path in sorted(directory.iterdir()):
        text = path.read_text(errors="replace")
        # Who traces for an attachment runs on a stack of its own, and ends there: not an error.
        text = "\n".join(line for line in text.splitlines() if not re.search(NO_ERROR, line))
        if not text.strip():
            continue
        if "ERROR: LeakSanitizer" not in text:
            found.append(text)
            continue
        for block in text.split("\n\n"):
            # Frame 0 is the sanitizer's allocator, frame 1 its caller.
            caller = re.search(r"^ *#1 .*$", block, re.MULTILINE)
            if caller and "dirtylog/" in caller[0] and "site-packages" not in caller[0]:
                found.append(block)
    return found


def library(name: str) -> str | None:
    """Return the path of gcc's run-time library for one sanitizer, or None where it is not installed."""
    if shutil.which("gcc") is None:
        return None
    path = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return str(Path(path).resolve()) if os.path.isabs(path) else None


def watched(log: Path) -> dict[str, str] | None:
    """Return the environment of a process that is watched and reports into `log`; None where gcc has no sanitizer."""
    preload = [library("libasan.so"), library("libubsan.so")]
    if None in preload:
        return None
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": ":".join(path for path in preload if path)}
    environment["ASAN_OPTIONS"] += f":log_path={log}/report"
    return environment


def main() -> int:
    """Build, run, and hand on pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scratch.add_argument(parser)
    options, pytest_arguments = parser.parse_known_args()
    with scratch.directory(options.scratch, "sanitize") as target:
        log = target / "sanitizer-reports"
        shutil.rmtree(log, ignore_errors=True)
        log.mkdir()
        environment = watched(log)
        if environment is None:
            print(
                "gcc has no libasan.so or libubsan.so here (Debian: libasan and libubsan of gcc's version)",
                file=sys.stderr,
            )
            return 2
        scratch.copy(target)
        scratch.build(target, {**os.environ, "DIRTYLOG_SANITIZE": "address,undefined"})
        ignored = [f"--ignore={name}" for name in NOT_HERE if (target / name).exists()]
        # Standard error stays that of the process, or what UBSan says last would end with it in pytest's hands.
        command = [sys.executable, "-c", PYTEST, "-p", "no:cacheprovider", "--capture=sys", *ignored]
        status = subprocess.run([*command, *pytest_arguments], cwd=target, env=environment, check=False).returncode
        found = reports(log)
        print("\n".join(found) or "the sanitizers reported nothing")
        return status or bool(found)


if __name__ == "__main__":
    sys.exit(main())
