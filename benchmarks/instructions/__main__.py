"""Count the instructions of the hot paths with callgrind and compare them with the recorded counts.

Those of the C functions, on each vector path that valgrind knows, and those of
calls from Python on few pages, where the call itself is what costs. Counts
belong to one compiler, those of calls to one CPython and numpy as well: with
another one there is nothing to compare with, and the program says so and ends
well.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.instructions import calls

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "dirtylog"
RECORDED = HERE / "recorded.json"
PATHS = ("scalar", "avx2")
TOLERANCE = 0.03
CALL_TOLERANCE = 0.05  # the allocator's share differs a little from run to run


def compiler() -> str:
    """Return what the C compiler calls itself; empty if there is none."""
    if shutil.which("gcc") is None:
        return ""
    return subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def count(directory: Path, path: str) -> dict[str, int]:
    """Return the instructions of each hot function on one vector path."""
    program = directory / "driver"
    if not program.exists():
        sources = [HERE / "driver.c", PACKAGE / "_bits" / "simd.c"]
        flags = ["-O3", "-std=gnu11", f"-I{PACKAGE / 'include'}", f"-I{PACKAGE}"]
        subprocess.run(["gcc", *flags, *map(str, sources), "-o", str(program)], check=True)
    output = directory / f"callgrind.{path}"
    subprocess.run(
        ["valgrind", "--tool=callgrind", "-q", f"--callgrind-out-file={output}", str(program), path], check=True
    )
    table = subprocess.run(
        ["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(output)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.findall(r"^\s*([\d,]+) \([^)]*\)\s+\S*?:hot_(\w+)", table, re.MULTILINE)
    return {name: int(number.replace(",", "")) for number, name in found}


def compare(title: str, recorded: dict[str, int], found: dict[str, int], tolerance: float) -> int:
    """Print each count beside the recorded one; return how many are worse."""
    worse = 0
    for name, before in recorded.items():
        now = found.get(name)
        if now is None:
            raise SystemExit(f"{name} on {title} was not counted: it is not among what is run any more")
        change = now / before - 1
        worse += change > tolerance
        verdict = "WORSE" if change > tolerance else "better" if change < -tolerance else "same"
        print(f"{title:7} {name:32} {now:>10} instructions, {before:>10} recorded  {change:+7.1%}  {verdict}")
    return worse


def main() -> int:
    """Compare, or record; 1 if a hot path takes more instructions than it did."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the counts found instead of comparing them")
    args = parser.parse_args()
    if shutil.which("valgrind") is None or not compiler():
        print("instruction counts: skipped, valgrind or gcc is not on PATH")
        return 0
    with tempfile.TemporaryDirectory() as directory:
        found = {path: count(Path(directory), path) for path in PATHS}
        called = calls.count(Path(directory), PATHS[-1])
    if args.record:
        kept = {"compiler": compiler(), "instructions": found, "python": calls.made_of(), "calls": called}
        RECORDED.write_text(json.dumps(kept, indent=2) + "\n")
    recorded = json.loads(RECORDED.read_text())
    if recorded["compiler"] != compiler():
        print(f"instruction counts: skipped, recorded with {recorded['compiler']}, this is {compiler()}")
        return 0
    worse = sum(compare(path, recorded["instructions"][path], found[path], TOLERANCE) for path in PATHS)
    if recorded["python"] != calls.made_of():
        print(f"calls: skipped, recorded with {recorded['python']}, this is {calls.made_of()}")
    else:
        worse += compare("call", recorded["calls"], called, CALL_TOLERANCE)
    return worse > 0


if __name__ == "__main__":
    sys.exit(main())
