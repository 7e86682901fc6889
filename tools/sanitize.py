"""Run the test suite with the extension modules built under AddressSanitizer and UndefinedBehaviorSanitizer.

``python tools/sanitize.py [--scratch DIR] [pytest arguments]``: builds a copy of the checkout, loads the sanitizer
before Python and runs pytest there. Exits with pytest's status, or 2 where the compiler has no sanitizer.

ThreadSanitizer has its own program, because Python itself is not built with it: ``pytest tests/sanitize``.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import scratch

OPTIONS = {
    # Blocks come from malloc, where the sanitizer sees each of them, and not from Python's arenas.
    "PYTHONMALLOC": "malloc",
    # Leaks are not looked for: Python keeps interned strings, types and modules until the process ends, each a report.
    # The library's own blocks are counted by its tests instead.
    # allocator_may_return_null: tests ask for absurd sizes and expect MemoryError, as malloc would have them.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "halt_on_error=1:abort_on_error=1:print_stacktrace=1",
}
# Programs and models that Python only starts (the sanitizer would watch the compiler), and extensions of others,
# which a Python without the sanitizer builds and loads.
NOT_HERE = ("tests/formal", "tests/sanitize", "tests/docs", "tests/capi")
# The comparing tracker reads whole pages, the bytes beside an unaligned array included. That is its contract, since a
# neighbour's write dirties the page, too, and the page is mapped; but the sanitizer knows the array's bytes alone.
# What compares is run by tests/core.
NOT_THESE = "not (test_memory and compare)"


def library(name: str) -> str | None:
    """Return the path of gcc's run-time library for one sanitizer, or None where it is not installed."""
    if shutil.which("gcc") is None:
        return None
    path = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return str(Path(path).resolve()) if os.path.isabs(path) else None


def main() -> int:
    """Build, run, and hand on pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scratch", type=Path, help="directory to build in, kept for the next run (default: temporary)"
    )
    options, pytest_arguments = parser.parse_known_args()
    preload = [library("libasan.so"), library("libubsan.so")]
    if None in preload:
        print(
            "gcc has no libasan.so or libubsan.so here (Debian: libasan and libubsan of gcc's version)", file=sys.stderr
        )
        return 2
    target = options.scratch or Path(tempfile.mkdtemp(prefix="dirtylog-sanitize-"))
    try:
        target.mkdir(parents=True, exist_ok=True)
        scratch.copy(target)
        scratch.build(target, {**os.environ, "DIRTYLOG_SANITIZE": "address,undefined"})
        environment = {**os.environ, **OPTIONS, "LD_PRELOAD": ":".join(path for path in preload if path)}
        ignored = [f"--ignore={name}" for name in NOT_HERE if (target / name).exists()]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            *ignored,
            "-k",
            NOT_THESE,
            *pytest_arguments,
        ]
        return subprocess.run(command, cwd=target, env=environment, check=False).returncode
    finally:
        if options.scratch is None:
            shutil.rmtree(target, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
