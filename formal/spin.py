"""Run one check: Spin writes a verifier in C, it is compiled and run, and its report is read."""

import itertools
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from formal.catalog import Check

MODELS = Path(__file__).parent / "models"
DEPTH = 5_000_000  # steps of the longest path; a path cut off is an error, never a pass
MEMORY = 6_000  # MB
# The verifiers of these models run no faster at -O2, and take twice as long to compile.
LEVEL = "-O1"


class SpinError(RuntimeError):
    """Spin or its verifier gave no verdict."""


@dataclass(frozen=True)
class Result:
    """What one run said.

    Attributes
    ----------
    verdict : str
        "holds", or "refuted".
    states : int
        Distinct states visited.
    seconds : float
        Wall-clock time of translation, compilation and search.
    trail : tuple of str
        The story of the shortest counterexample, one line a step; empty if the property holds.
    unreached : tuple of str
        Statements of the model that no execution reached: a check that holds must have none.
    """

    check: Check
    verdict: str
    states: int
    seconds: float
    trail: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()

    @property
    def as_expected(self) -> bool:
        """Whether the verdict is the one the catalogue demands, and the search covered the model."""
        return self.verdict == self.check.expect and not (self.verdict == "holds" and self.unreached)


def missing() -> list[str]:
    """Return the programs that a run needs and that are not installed."""
    return [program for program in ("spin", "gcc") if shutil.which(program) is None]


def _run(command: list[str], directory: Path, timeout: float) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise SpinError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.stdout


def _unreached(report: str) -> tuple[str, ...]:
    """Lines under "unreached in ..." that name a statement; a process that never ends has no end to reach."""
    lines = re.findall(r"^\t(\S+:\d+, state \d+, .*)$", report, re.MULTILINE)
    return tuple(line for line in lines if '"-end-"' not in line)


def _story(directory: Path, source: str, macros: list[str]) -> tuple[str, ...]:
    """Replay the trail: the steps' own words, and the assertion at its end, which must fail there, too."""
    replay = _run(["spin", *macros, "-t", source], directory, 60)
    if "text of failed assertion" not in replay:
        raise SpinError(
            f"the trail of {source} {' '.join(macros)} does not end in a failed assertion:\n{replay[-2000:]}"
        )
    lines = [line.strip() for line in replay.splitlines() if line.strip()]
    # Of a clock that was put back meanwhile it warns first: the model is newer than its trail.
    told = itertools.dropwhile(lambda line: line.startswith("spin: warning"), lines)
    return tuple(itertools.takewhile(lambda line: not line.startswith("spin: "), told))


def run(check: Check, timeout: float = 600) -> Result:
    """Run one check in a directory of its own.

    The search is exhaustive. Depth-first with partial-order reduction where the property must
    hold; breadth-first where it must be refuted, which finds a shortest counterexample.

    Raises
    ------
    SpinError
        No verdict: a program failed, the search was cut off by depth or memory, or something
        other than the checked assertion failed (a deadlock, a model error).
    """
    begin = time.perf_counter()
    macros = [f"-D{name}" for name in check.defines]
    refuting = check.expect == "refuted"
    with tempfile.TemporaryDirectory(prefix="formal-") as name:
        directory = Path(name)
        for model in MODELS.glob("*.pml"):
            shutil.copy(model, directory)
        source = f"{check.model}.pml"
        _run(["spin", *macros, "-a", source], directory, 60)
        search = ["-DBFS"] if refuting else []
        _run(["gcc", LEVEL, "-w", "-DSAFETY", f"-DMEMLIM={MEMORY}", *search, "-o", "pan", "pan.c"], directory, 120)
        report = _run(["./pan"] if refuting else ["./pan", f"-m{DEPTH}"], directory, timeout)
        counted = re.search(r"^\s*([\d.e+]+) states, stored", report, re.MULTILINE)
        errors = re.search(r"errors: (\d+)", report)
        cut_off = "max search depth too small" in report or "Search not completed" in report
        if not counted or not errors or (cut_off and errors[1] == "0"):
            raise SpinError(f"{check.name}: no verdict from the verifier:\n{report[-2000:]}")
        states = int(float(counted[1]))
        if errors[1] == "0":
            return Result(check, "holds", states, time.perf_counter() - begin, unreached=_unreached(report))
        if "assertion violated" not in report:
            raise SpinError(f"{check.name}: an error that is no failed assertion:\n{report[-2000:]}")
        story = _story(directory, source, macros)
        return Result(check, "refuted", states, time.perf_counter() - begin, trail=story)
