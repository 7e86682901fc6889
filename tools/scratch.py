"""A copy of the checkout to build in, so that special builds never touch the one that people work in."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Declare where to build."""
    parser.add_argument(
        "--scratch", type=Path, help="directory to build in, kept for the next run (default: temporary)"
    )


@contextmanager
def directory(asked: Path | None, name: str) -> Iterator[Path]:
    """Make the directory that was asked for, or one that is removed at the end."""
    target = (asked or Path(tempfile.mkdtemp(prefix=f"dirtylog-{name}-"))).absolute()
    try:
        target.mkdir(parents=True, exist_ok=True)
        yield target
    finally:
        if asked is None:
            shutil.rmtree(target, ignore_errors=True)


def tracked() -> list[Path]:
    """Return the files of the checkout, committed or not, that git does not ignore; all of them where git is absent."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        unwanted = {"build", "dist", "__pycache__"}
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file() and path.suffix != ".so")
        return [path for path in found if not unwanted.intersection(path.parts)]
    return [Path(name) for name in listing.decode().split("\0") if name]


def copy(target: Path) -> Path:
    """Bring `target` up to date with the checkout; files that did not change keep their time stamps."""
    for name in tracked():
        source, place = ROOT / name, target / name
        if not source.is_file():
            continue
        if place.is_file() and place.read_bytes() == source.read_bytes():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, place)
    return target


def build(target: Path, environment: dict[str, str], interpreter: Path = Path(sys.executable)) -> None:
    """Build the extension modules of the copy in place, for `interpreter` or what `environment` makes of it.

    Raises
    ------
    RuntimeError
        The build failed; the message ends with what the compiler said.
    """
    command = [str(interpreter), "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=target, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
