"""Call every class from threads with ThreadSanitizer in the extension modules and in a CPython without a GIL.

``python tools/races.py [--cache DIR] [--scratch DIR] [--version 3.13] [--suite trixie] [--turns N]``: the interpreter
is that of ``tools/freethreaded.py``, kept in the same cache, with a second program beside it that was built for the
sanitizer. dirtylog is built for the sanitizer in a copy of the checkout; then ``tests/sanitize/all_at_once.py`` runs.
Exits with its status, 1 if there was a race in which code of ours had a part, or 2 where a tool is missing.

What is not watched: numpy and Python's own extension modules, which are no code of ours, and vector code, whose loads
the sanitizer takes for plain ones (``DIRTYLOG_SIMD=scalar``). gcc's sanitizer does not know fences.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import debian
import freethreaded
import scratch


def watched(options: argparse.Namespace) -> Path:
    """Return the interpreter that is built for the sanitizer, from the cache or new.

    It is the program alone: all else is that of the interpreter without, since both are of one source and one ABI.
    """
    home = freethreaded.home_of(options)
    command = home / "bin" / f"python{options.version}t-watched"
    if not command.exists():
        with scratch.directory(None, "races") as target:
            place = freethreaded.source(target, options)
            make = freethreaded.configured(place, home, "--with-thread-sanitizer")
            # It runs while it is built.
            unheard = {**os.environ, "TSAN_OPTIONS": "report_bugs=0"}
            debian.run(["setarch", "-R", *make, "python"], cwd=place, env=unheard)
            shutil.copy2(place / "python", command)
    return command


def reports(directory: Path, modules: set[str]) -> list[str]:
    """Return the reports in which one of the two accesses was made by, or on behalf of, one of these modules.

    In place of a list of races to suppress: what CPython does by itself is not ours to judge, and a name in such a
    list hides whatever has it anywhere in its stack.
    """
    found = []
    for path in sorted(directory.iterdir()):
        for report in path.read_text(errors="replace").split("==================\n"):
            # After the stacks of both come those of others: where the memory is from, and the threads.
            accesses = re.split(r"^  (?:Location|Mutex|Thread|As if) ", report, maxsplit=1, flags=re.MULTILINE)[0]
            if modules.intersection(re.findall(r"\(([^()+]+)\+0x[0-9a-f]+\)", accesses)):
                found.append(report)
    return found


def main() -> int:
    """Build, run, and hand on the status, or that races were found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    freethreaded.add_arguments(parser)
    parser.add_argument("--turns", default="300", help="calls of each thread on each object (%(default)s)")
    options = parser.parse_args()
    if freethreaded.missing():
        return 2
    plain = freethreaded.interpreter(options)
    command = watched(options)
    with scratch.directory(options.scratch, "races") as target:
        python = freethreaded.environment(target / "venv", plain)
        copy = scratch.copy(target / "copy")
        scratch.build(copy, {**os.environ, "DIRTYLOG_SANITIZE": "thread"}, python)
        log = target / "sanitizer-reports"
        shutil.rmtree(log, ignore_errors=True)
        log.mkdir()
        (packages,) = (target / "venv" / "lib").glob("python*/site-packages")
        variables = {
            **os.environ,
            "DIRTYLOG_SIMD": "scalar",
            "PYTHONPATH": f"{copy}:{packages}",
            "TSAN_OPTIONS": f"log_path={log}/report:exitcode=0",
        }
        variables.pop("PYTHON_GIL", None)
        # The sanitizer's memory has fixed places, which the kernel must not have given away already.
        program = ["setarch", "-R", command, "tests/sanitize/all_at_once.py", options.turns]
        status = subprocess.run(program, cwd=copy, env=variables, check=False).returncode
        found = reports(log, {module.name for module in (copy / "dirtylog").rglob("*.so")})
        print("\n".join(found) or "no race was reported in which code of ours had a part")
        return status or bool(found)


if __name__ == "__main__":
    sys.exit(main())
