"""Do the tests notice? One-line mistakes in the core and the machine, each built and run against its tests.

``python tools/mutate.py [--scratch DIR] [--only PATTERN ...] [--start NAME] [--list]``: in a scratch copy, for each
mutation in ``mutations.txt``: change one place, rebuild the modules that hold it, run its tests, restore. Prints a
table and exits with 1 if one survives, if its tests fail without it, or if it no longer applies, because its line has
changed: then write it anew.
"""

import argparse
import fnmatch
import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import scratch

LIST = Path(__file__).with_name("mutations.txt")
# Mutants are built without optimisation: the compile time is most of the run.
ENVIRONMENT = {**os.environ, "DIRTYLOG_DEBUG": "1", "PYTHONDONTWRITEBYTECODE": "1"}
# The first weighs the speed of two threads, which an unoptimised build tells nothing about. The others reserve more
# address space than a mutant may have.
NOT_THESE = (
    "not (test_another_thread_runs_python_during_bulk_work or test_what_would_fill_the_memory_with_page_tables"
    " or test_memory_that_is_reserved_and_not_touched or test_address_space_reserved_by_the_terabyte)"
)
# A mutant may hang or crash: both are caught mutants.
TIMEOUT = 240
# Nor may it take the machine's memory with it, in bytes of address space. ThreadSanitizer and Chromium map terabytes.
MEMORY = 16 << 30
BOUNDLESS = ("tests/sanitize", "tests/sinks/test_report.py")
# Builds the modules that are named, and no others.
BUILD = """
import sys
import setuptools
wanted = set(sys.argv[1:])
whole = setuptools.setup
def chosen(ext_modules, **others):
    whole(ext_modules=[extension for extension in ext_modules if extension.name in wanted], **others)
setuptools.setup = chosen
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": "setup.py", "__name__": "__main__"})
"""


@dataclass
class Mutation:
    """One mistake: `old` in `file` becomes `new`, `modules` are rebuilt, `tests` have to notice."""

    name: str
    file: str
    modules: tuple[str, ...]
    tests: tuple[str, ...]
    old: str = ""
    new: str = ""


def read_mutations() -> list[Mutation]:
    """Read the list; its format is said at its head."""
    found: list[Mutation] = []
    for line in LIST.read_text().splitlines():
        match line[:1]:
            case "@":
                name, file, modules, tests = line[1:].strip().split(", ")
                found.append(Mutation(name, file, tuple(modules.replace("-", "").split()), tuple(tests.split())))
            case "-":
                found[-1].old += "\n" * bool(found[-1].old) + line[1:]
            case "+":
                found[-1].new += "\n" * bool(found[-1].new) + line[1:]
    return found


def build(directory: Path, modules: tuple[str, ...]) -> str:
    """Build some extension modules; returns what went wrong, "" if nothing did."""
    if not modules:
        return ""
    command = [sys.executable, "-c", BUILD, *modules]
    done = subprocess.run(command, cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


def run_tests(directory: Path, tests: tuple[str, ...]) -> str:
    """Run tests, a directory after the other, until one fails; returns its name, "" if all pass."""
    return next(filter(None, (run_directory(directory, test) for test in tests)), "")


def run_directory(directory: Path, tests: str) -> str:
    """Run one directory's tests until one fails; returns its name, "" if all pass."""
    limit = resource.RLIM_INFINITY if tests.startswith(BOUNDLESS) else MEMORY
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--benchmark-skip", "--no-header"]
    try:
        done = subprocess.run(
            [*command, "--timeout=60", "-k", NOT_THESE, tests],
            cwd=directory,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            # Only the soft limit: some tests set one of their own.
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY)),
        )
    except subprocess.TimeoutExpired:
        return f"hangs for {TIMEOUT} s"
    if done.returncode == 0:
        return ""
    # What a test has logged as an error begins alike.
    found = re.search(r"^(?:FAILED|ERROR) (\S+::\S+)", done.stdout, re.MULTILINE)
    return found[1] if found else f"pytest ends with {done.returncode}"


def built(directory: Path, modules: tuple[str, ...]) -> dict[Path, bytes]:
    """Return the extension modules' files and what is in them."""
    found = [path for name in modules for path in directory.glob(f"{name.replace('.', '/')}.*.so")]
    return {path: path.read_bytes() for path in found}


def attempt(directory: Path, mutation: Mutation) -> str:
    """Apply one mutation, build, test, restore source and modules; returns who caught it, "" if nobody."""
    place = directory / mutation.file
    original = place.read_text()
    intact = built(directory, mutation.modules)
    try:
        place.write_text(original.replace(mutation.old, mutation.new))
        if problem := build(directory, mutation.modules):
            # A mistake that the compiler finds tests nothing: the list wants another one.
            print(f"{mutation.name} does not compile:\n{problem}", file=sys.stderr)
            return ""
        return run_tests(directory, mutation.tests)
    finally:
        place.write_text(original)
        for path, content in intact.items():
            path.write_bytes(content)


def stale(directory: Path, mutations: list[Mutation]) -> list[str]:
    """Return the mutations whose text is not in its file exactly once."""
    return [m.name for m in mutations if (directory / m.file).read_text().count(m.old) != 1]


def main() -> int:
    """Run the mutations asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scratch.add_argument(parser)
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="names of mutations, as shell patterns"
    )
    parser.add_argument(
        "--start", metavar="NAME", help="leave out what is listed before this one: to go on after a stop"
    )
    parser.add_argument("--list", action="store_true", help="print the mutations, and run nothing")
    options = parser.parse_args()
    mutations = read_mutations()
    names = [mutation.name for mutation in mutations]
    if options.start and options.start not in names:
        parser.error(f"--start {options.start} names no mutation; --list prints them")
    first = names.index(options.start) if options.start else 0
    chosen = [
        mutation for mutation in mutations[first:] if any(fnmatch.fnmatch(mutation.name, only) for only in options.only)
    ]
    if options.list:
        for mutation in chosen:
            print(f"{mutation.name:<42} {mutation.file:<40} {mutation.old.strip()}  ->  {mutation.new.strip()}")
        return 0
    with scratch.directory(options.scratch, "mutate") as directory:
        scratch.copy(directory)
        if changed := stale(directory, chosen):
            print(f"no longer in the source exactly once: {', '.join(changed)}", file=sys.stderr)
            return 1
        scratch.build(directory, ENVIRONMENT)
        survivors: list[str] = []
        broken: dict[tuple[str, ...], str] = {}
        for mutation in chosen:
            # Tests that fail anyway catch nothing: what they should notice has no verdict, and the rest goes on.
            if mutation.tests not in broken:
                broken[mutation.tests] = run_tests(directory, mutation.tests)
            begin = time.perf_counter()
            if by := broken[mutation.tests]:
                verdict, by = "NO TESTS", f"before anything was mutated: {by}"
            else:
                by = attempt(directory, mutation)
                survivors += [mutation.name] * (not by)
                verdict = "caught" if by else "SURVIVED"
            print(f"{mutation.name:<42} {verdict:<9} {time.perf_counter() - begin:>5.0f} s  {by}", flush=True)
        without = [mutation.name for mutation in chosen if broken[mutation.tests]]
        print(
            f"{len(chosen) - len(survivors) - len(without)} of {len(chosen)} caught; "
            f"survived: {', '.join(survivors) or 'none'}; without a verdict: {', '.join(without) or 'none'}"
        )
        return 1 if survivors or without else 0


if __name__ == "__main__":
    sys.exit(main())
