"""Build dirtylog for 64-bit Arm with Debian's cross compiler, and run tests of it under qemu's user-mode emulator.

``python tools/emulate.py [--scratch DIR] [--drivers | --fetch] [pytest arguments]``: fetches Debian's Python for arm64
into the scratch directory, without touching the system's packages, builds a copy of the checkout for it, runs the C
programs of ``tests/core``, and then pytest. ``--drivers`` runs the C programs alone, which needs neither Python nor
network; ``--fetch`` only fetches. Exits with pytest's status, 1 if a C program failed, or 2 where a tool is missing or
nothing can be fetched
(Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user).

An emulator on x86 has the memory order of x86: what runs here is the code, and not its order on a real Arm.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import debian
import scratch

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
DRIVERS = {"harvest_parts": [], "kernels": ["dirtylog/_bits/simd.c"]}
TESTS = ("tests/core", "tests/log", "tests/vm")
VERSION = "{}.{}".format(*sys.version_info[:2])
# Of the distribution's own packages, with what they need; and the headers, which would need too much.
PACKAGES, HEADERS = ("python3", "libstdc++6"), f"libpython{VERSION}-dev"
NEEDED = ("numpy", "pytest", "pytest-benchmark", "pytest-timeout", "hypothesis")
# Starts pytest with an interpreter that the processes which tests start can start as well.
PYTEST = "import sys; sys.executable = {!r}; import pytest; sys.exit(pytest.main())"


def drivers(target: Path) -> int:
    """Run the C programs; return how many failed."""
    failed = 0
    for name, sources in DRIVERS.items():
        program = target / f"{name}.arm64"
        files = [f"tests/core/{name}.c", *sources, "-o", program]
        debian.run(
            [COMPILER, "-std=gnu11", "-O3", "-static", "-Idirtylog/include", "-Idirtylog", *files], cwd=scratch.ROOT
        )
        status = subprocess.run([EMULATOR, program], check=False).returncode
        print(f"{name} on arm64: {'ended with ' + str(status) if status else 'passed'}")
        failed += status != 0
    return failed


def fetch_python(target: Path) -> Path:
    """Unpack Debian's Python for arm64 and return where."""
    tree, apt = target / "tree", target / "apt"
    if (tree / "complete").exists():
        return tree
    environment = debian.lists(apt, APT__Architecture="arm64", APT__Architectures="arm64")
    archives = apt / "cache" / "archives"
    debian.run(["apt-get", "install", "-qq", "--yes", "--download-only", *PACKAGES], env=environment)
    debian.run(["apt-get", "download", "-qq", HEADERS], env=environment, cwd=archives)
    for package in sorted(archives.glob("*.deb")):
        debian.run(["dpkg-deb", "-x", package, tree])
    platforms = ["manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64"]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--only-binary=:all:", f"--python-version={VERSION}"]
    debian.run([*pip, f"--target={tree / 'site'}", *(f"--platform={name}" for name in platforms), *NEEDED])
    (tree / "complete").touch()
    return tree


def build(copy: Path, tree: Path) -> None:
    """Build the extension modules of the copy for the Python in `tree`."""
    library = tree / "usr" / "lib" / f"python{VERSION}"
    told = copy.parent / "sysconfig"
    told.mkdir(exist_ok=True)
    shutil.copy(library / "_sysconfigdata__aarch64-linux-gnu.py", told)
    environment = {
        "CC": f"{'ccache ' if shutil.which('ccache') else ''}{COMPILER}",
        "LDSHARED": f"{COMPILER} -shared",
        "CFLAGS": f"-I{tree}/usr/include/python{VERSION} -I{tree}/usr/include",
        "PYTHONPATH": str(told),
        "_PYTHON_SYSCONFIGDATA_NAME": "_sysconfigdata__aarch64-linux-gnu",
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
    }
    scratch.build(copy, {**os.environ, **environment})


def interpreter(target: Path, tree: Path) -> Path:
    """Return a command that is Python for arm64."""
    command = target / "python"
    command.write_text(
        f"#!/bin/sh\nPYTHONPATH={tree}/site exec {EMULATOR} -L {tree} {tree}/usr/bin/python{VERSION} " + '"$@"\n'
    )
    command.chmod(0o755)
    return command


def main() -> int:
    """Build, run, and hand on pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scratch.add_argument(parser)
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--drivers", action="store_true", help="run the C programs alone")
    alone.add_argument("--fetch", action="store_true", help="fetch Python into the scratch directory, and run nothing")
    options, pytest_arguments = parser.parse_known_args()
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            print(
                f"{tool} is not on PATH (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)",
                file=sys.stderr,
            )
            return 2
    with scratch.directory(options.scratch, "emulate") as target:
        failed = 0 if options.fetch else drivers(target)
        if options.drivers or failed:
            return failed != 0
        try:
            tree = fetch_python(target)
        except RuntimeError as error:
            print(f"Python for arm64 cannot be fetched: {error}", file=sys.stderr)
            return 2
        if options.fetch:
            return 0
        copy = scratch.copy(target / "copy")
        build(copy, tree)
        command = interpreter(target, tree)
        arguments = pytest_arguments or ["-q", *TESTS]
        program = [command, "-c", PYTEST.format(str(command)), "-p", "no:cacheprovider", *arguments]
        environment = {"DIRTYLOG_HYPOTHESIS": "few", **os.environ, "DIRTYLOG_EMULATOR": EMULATOR}
        return subprocess.run(program, cwd=copy, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
