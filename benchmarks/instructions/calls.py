"""Count the instructions of calls from Python, CPython's and numpy's own among them; and be what callgrind runs."""

import ctypes
import gc
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.calls import calls, run

HERE = Path(__file__).parent
COUNT = 200


def made_of() -> str:
    """Name what the counts depend on besides the C compiler."""
    return f"CPython {platform.python_version()}, numpy {np.__version__}"


def measure(library: str) -> None:
    """Make each call `COUNT` times between two marks for callgrind; again, since the allocator may tidy up."""
    counter = ctypes.CDLL(library)
    gc.disable()
    for name, call in calls().items():
        for _ in range(4):
            run(call, COUNT)
            counter.begin()
            run(call, COUNT)
            counter.end(name.encode())


def under_callgrind(module: str, arguments: list[str], output: Path, path: str, *options: str) -> None:
    """Run a module that says where to count by the library it is given first; each count is a file beside `output`."""
    library = output.with_name("counter.so")
    if not library.exists():
        command = ["gcc", "-O1", "-shared", "-fPIC", str(HERE / "counter.c"), "-o", str(library)]
        subprocess.run(command, check=True)
    valgrind = ["valgrind", "--tool=callgrind", "-q", "--instr-atstart=no", f"--callgrind-out-file={output}", *options]
    program = [sys.executable, "-m", module, str(library), *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "DIRTYLOG_SIMD": path}
    subprocess.run([*valgrind, *program], check=True, env=environment, cwd=HERE.parents[1])


def count(directory: Path, path: str) -> dict[str, int]:
    """Return the instructions of one call, for each of them, on one vector path."""
    under_callgrind("benchmarks.instructions.calls", [], directory / f"calls.{path}", path)
    found: dict[str, int] = {}
    for dump in directory.glob(f"calls.{path}.*"):
        text = dump.read_text()
        name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
        total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
        if name and total:
            each = int(total[1]) // COUNT
            found[name[1]] = min(each, found.get(name[1], each))
    return found


if __name__ == "__main__":
    measure(sys.argv[1])
