"""Build a CPython without a GIL from Debian's source package, and run tests of dirtylog under it.

``python tools/freethreaded.py [--cache DIR] [--scratch DIR] [--version 3.13] [--suite trixie] [pytest arguments]``: no
package index has such an interpreter. It is built once, in five to fifteen minutes, and kept in the cache directory
(``~/.cache/dirtylog``, or below ``XDG_CACHE_HOME``). Then dirtylog is built for it in a copy of the checkout, and every
module is imported, which must leave the GIL off. Two runs of pytest follow: the suite, and 10^9 marks of which none may
be lost. Exits with the status of the first that failed, or 2 where a tool is missing (Debian: gcc, make, and headers:
libffi-dev libssl-dev zlib1g-dev libbz2-dev liblzma-dev libsqlite3-dev).
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import debian
import scratch

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# What has wheels for it, and the two that are compiled where they have none.
NEEDED = ("numpy", "hypothesis", "pytest", "pytest-benchmark", "pytest-timeout", "rich", "setuptools")
MAYBE = ("matplotlib", "pyarrow", "xxhash")
COMPILED = ("cython>=3.3,<3.4", "zstandard")
# Tests that are about the checkout, or about other programs than this interpreter.
LEFT_OUT = ("docs", "formal", "interop", "sanitize", "test_build.py", "test_checkout.py", "test_mutations.py")
MARKS = ("tests/core/test_every_mark.py", "tests/stress/test_marks.py")
STRESS = ("-m", "stress", "--timeout", "3600", "--stress-marks", "1000000000", "--stress-seconds", "20", *MARKS)
IMPORTS = """
import importlib, pkgutil, sys, dirtylog
for module in pkgutil.walk_packages(dirtylog.__path__, "dirtylog."):
    if module.name != "dirtylog.__main__":
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            print(module.name, "is left out:", error)
print(sys.version)
sys.exit("the GIL is on" if sys._is_gil_enabled() else 0)
"""


def source(target: Path, options: argparse.Namespace) -> Path:
    """Fetch the source of the interpreter into `target`; return where it was unpacked."""
    line = target / "sources.list"
    line.write_text(f"deb-src [signed-by={KEYRING}] {options.mirror} {options.suite} main\n")
    apt = debian.lists(target / "apt", Dir__Etc__sourcelist=line, Dir__Etc__sourceparts="/dev/null")
    # apt checks the signatures; Debian's own changes, which are about its other packages, are left alone.
    debian.run(["apt-get", "source", "-qq", "--download-only", f"python{options.version}"], env=apt, cwd=target)
    (archive,) = target.glob("*.orig.tar.xz")
    place = target / "source"
    place.mkdir()
    debian.run(["tar", "-xJf", archive, "-C", place, "--strip-components=1"])
    return place


def configured(place: Path, home: Path, *more: str) -> list[str]:
    """Prepare to build an interpreter that lives in `home`; return the command that makes what is named after it."""
    options = ["--disable-gil", "--disable-test-modules", "--with-ensurepip=install", f"--prefix={home}", *more]
    debian.run(["./configure", "-q", *options], cwd=place)
    return ["make", "-s", f"-j{len(os.sched_getaffinity(0))}"]


def home_of(options: argparse.Namespace) -> Path:
    """Return where the interpreter is kept."""
    return Path(options.cache.absolute() / f"python{options.version}t")


def interpreter(options: argparse.Namespace) -> Path:
    """Return the interpreter that the cache holds, or build it there."""
    home = home_of(options)
    if not (home / "complete").exists():
        with scratch.directory(None, "freethreaded") as target:
            place = source(target, options)
            make = configured(place, home)
            debian.run(make, cwd=place)
            debian.run([*make, "install"], cwd=place)
        (home / "complete").touch()
    return home / "bin" / f"python{options.version}t"


def environment(directory: Path, command: Path) -> Path:
    """Make a virtual environment with what the tests need; return its interpreter."""
    python = directory / "bin" / "python"
    if not python.exists():
        debian.run([command, "-m", "venv", directory])
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    debian.run([*pip, "--only-binary=:all:", *NEEDED])
    for name in MAYBE:  # tests that need one which is not there skip
        subprocess.run([*pip, "--only-binary=:all:", name], capture_output=True, check=False)
    debian.run([*pip, *COMPILED])
    return python


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which interpreter, and where it is kept."""
    scratch.add_argument(parser)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dirtylog"
    parser.add_argument("--cache", type=Path, default=cache, help=f"where the interpreter is kept ({cache})")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="of Debian's archive")
    parser.add_argument("--suite", default="trixie", help="of Debian, which has that version (trixie)")
    parser.add_argument("--version", default="3.13", help="of Python (3.13)")


def missing() -> bool:
    """Say of the first tool that is not there that it is not."""
    for tool in ("apt-get", "gcc", "make"):
        if shutil.which(tool) is None:
            print(f"{tool} is not on PATH", file=sys.stderr)
            return True
    return False


def main() -> int:
    """Build both, run, and hand on the status of pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    options, pytest_arguments = parser.parse_known_args()
    if missing():
        return 2
    command = interpreter(options)
    with scratch.directory(options.scratch, "freethreaded") as target:
        python = environment(target / "venv", command)
        copy = scratch.copy(target / "copy")
        path = f"{python.parent}:{os.environ['PATH']}"
        variables = {"DIRTYLOG_HYPOTHESIS": "few", **os.environ, "PATH": path}
        variables.pop("PYTHON_GIL", None)  # whether it stays off is what is asked
        scratch.build(copy, variables, python)
        subprocess.run([python, "-W", "error", "-c", IMPORTS], cwd=copy, env=variables, check=True)
        whole = ["-q", "tests", *(f"--ignore=tests/{name}" for name in LEFT_OUT)]
        for arguments in [pytest_arguments] if pytest_arguments else [whole, [*STRESS, "-q"]]:
            tests = [python, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
            status = subprocess.run(tests, cwd=copy, env=variables, check=False).returncode
            if status:
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
