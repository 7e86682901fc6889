"""``python -m formal.arm``: what the compiler makes of the headers for 64-bit Arm, against that machine's memory model.

Each test is a few threads of real code: ``threads.c`` is compiled as an extension module would be, and every execution
that the architecture allows is enumerated. No write may be lost; of a wrong order it must be found that one may.
"""

import argparse
import fnmatch
import functools
import shutil
import subprocess
import sys
import time
from pathlib import Path

from formal.arm.catalog import FOREIGN, MACHINES, PAGES, SUMMARY, TESTS, TOP, WORDS, Test
from formal.arm.code import Thread, functions
from formal.arm.model import outcomes

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-gcc"
COLUMNS = "{:<34} {:<16} {:<9} {:>10} {:>7}"


@functools.cache
def compiled(machine: str) -> dict[str, list[str]]:
    """Return the assembly of each thread, as the compiler writes it for a machine."""
    source = Path(__file__).with_name("threads.c")
    flags = ["-std=gnu11", "-O3", f"-march={MACHINES[machine]}", "-mno-outline-atomics", "-Wall", "-Werror"]
    includes = [f"-I{ROOT / 'dirtylog'}", f"-I{ROOT / 'dirtylog' / 'include'}"]
    command = [COMPILER, *flags, "-Wno-unused-function", *includes, "-S", "-o", "-", str(source)]
    return functions(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def check(test: Test, code: dict[str, list[str]]) -> tuple[int, int]:
    """Return how many executions a test has, and how many of them end as they must not."""
    arguments = FOREIGN if test.foreign else (PAGES, WORDS, SUMMARY, *([TOP] if test.third else []))
    ends = [
        test.bad(outcome)
        for outcome in outcomes([Thread(code[name], arguments) for name in test.threads], test.initial())
    ]
    return len(ends), sum(ends)


def main(arguments: list[str] | None = None) -> int:
    """Run the tests; 0 if every verdict is the one demanded, 1 if not, 2 if the compiler is absent."""
    parser = argparse.ArgumentParser(prog="python -m formal.arm", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a test's name, or a pattern")
    options = parser.parse_args(arguments)
    chosen = [test for test in TESTS if not options.only or any(fnmatch.fnmatch(test.name, p) for p in options.only)]
    if not chosen:
        parser.error(
            f"--only {' '.join(options.only)} names no test; they are: {'; '.join(test.name for test in TESTS)}"
        )
    if shutil.which(COMPILER) is None:
        print(
            f"not installed: {COMPILER} (Debian packages: gcc-aarch64-linux-gnu libc6-dev-arm64-cross)", file=sys.stderr
        )
        return 2
    print(COLUMNS.format("test", "machine", "verdict", "executions", "time"))
    wrong = 0
    for machine in MACHINES:
        code = compiled(machine)
        for test in chosen:
            begin = time.perf_counter()
            executions, bad = check(test, code)
            as_demanded = executions and (bad > 0) == (machine in test.may_be)
            wrong += not as_demanded
            verdict = ("refuted" if bad else "holds") + ("" if as_demanded else "!")
            print(
                COLUMNS.format(test.name, machine, verdict, f"{executions:,}", f"{time.perf_counter() - begin:.1f} s"),
                flush=True,
            )
    print(f"{len(chosen) * len(MACHINES)} tests, {wrong} not as demanded")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
