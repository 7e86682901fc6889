"""Where the time of a row goes: ``python -m benchmarks.profile "harvest to numbers" --density 0.01``.

Callgrind counts what one turn of the work executes, function by function, CPython and numpy among them, and plays a
cache and a branch predictor: instructions, branches guessed wrongly (conditional and indirect), and misses of the first
and the last level of the cache. On AVX2, which is as far as valgrind knows. A locked instruction counts as one like any
other, and costs what twenty do.
"""

import argparse
import ctypes
import gc
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.instructions.calls import under_callgrind
from benchmarks.works import DENSITIES, OPERATIONS, contestants

EVENTS = ("Ir", "Bcm", "Bim", "D1mr", "D1mw", "DLmr", "DLmw")


def turn(library: str, operation: str, pages: int, density: float, contestant: str) -> None:
    """Do the work once to warm up and once between two marks: this is what callgrind runs."""
    counter = ctypes.CDLL(library)
    prepare, work = contestants(operation, pages, density)[contestant]
    gc.disable()
    for counted in (False, True):
        prepare()
        if counted:
            counter.begin()
        work()
    counter.end(b"turn")


def parsed(text: str) -> list[tuple[str, list[int]]]:
    """Return the functions of a table of callgrind_annotate, and the numbers of each; the first row is the whole."""
    found = []
    for line in text.splitlines():
        cells = re.match(r"\s*((?:(?:[\d,]+|\.)\s+(?:\([^)]*\)\s+)?)+)(\S.*)$", line)
        if cells:
            numbers = re.findall(r"(?:^|\s)([\d,]+|\.)(?=\s)", re.sub(r"\([^)]*\)", "", cells[1]))
            if len(numbers) == len(EVENTS):
                name = re.sub(r"^\S*:|\s*\[\S*/", lambda part: " [" if "[" in part[0] else "", cells[2])
                found.append((name, [0 if number == "." else int(number.replace(",", "")) for number in numbers]))
    return found


def main() -> int:
    """Print the functions that make up most of a row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("operation", choices=OPERATIONS, metavar="ROW", help=", ".join(OPERATIONS))
    parser.add_argument("--pages", type=int, default=1 << 20, help="pages of the bitmap (1048576)")
    parser.add_argument("--density", type=float, default=DENSITIES[2], help="share of them that is dirty (0.01)")
    parser.add_argument("--of", default="dirtylog", choices=("dirtylog", "reference", "numpy"), help="whose (dirtylog)")
    parser.add_argument("--functions", type=int, default=15, help="how many functions are named (15)")
    args = parser.parse_args()
    if not 0 <= args.density <= 1 or args.pages < 64:
        parser.error(f"density {args.density:g} must be from 0 to 1, and {args.pages} pages at least 64")
    for tool in ("valgrind", "gcc"):
        if shutil.which(tool) is None:
            parser.error(f"{tool} is not on PATH (Debian: apt install {tool})")
    row = [args.operation, str(args.pages), str(args.density), args.of]
    with tempfile.TemporaryDirectory(prefix="dirtylog-profile-") as directory:
        output = Path(directory) / "turn"
        under_callgrind("benchmarks.profile", row, output, "avx2", "--cache-sim=yes", "--branch-sim=yes")
        (dump,) = (path for path in Path(directory).glob("turn.*") if "Client Request: turn" in path.read_text())
        command = ["callgrind_annotate", "--threshold=100", f"--show={','.join(EVENTS)}", str(dump)]
        table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (_, whole), *functions = parsed(table)
    what = f"{args.operation}, {args.pages} pages, {args.density:g} of them dirty, {args.of}"
    print(f"{what}: one turn, {whole[0]:,} instructions")
    print(f"{'':>7}" + "".join(f"{event:>13}" for event in EVENTS))
    for name, numbers in [("all of it", whole), *functions[: args.functions]]:
        share = numbers[0] / whole[0]
        print(f"{share:>6.1%} " + "".join(f"{number:>13,}" for number in numbers) + f"  {name}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].endswith(".so"):
        turn(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5])
    else:
        sys.exit(main())
