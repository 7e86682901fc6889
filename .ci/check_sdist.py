"""Check what a source distribution carries: every file of the checkout that git has, and nothing that was built."""

import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What git alone needs, and what the build writes.
NOT_PACKED = {".gitignore"}
WRITTEN = {"PKG-INFO", "setup.cfg"}


def problems(sdist: Path, wanted: set[str]) -> list[str]:
    """Compare the files of an sdist with those that it should have."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    packed = {name for name in names - WRITTEN if not name.startswith("dirtylog.egg-info/")}
    return [
        *(f"missing: {name}" for name in sorted(wanted - packed)),
        *(f"has no place in an sdist: {name}" for name in sorted(packed - wanted)),
    ]


if __name__ == "__main__":
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = problems(Path(sys.argv[1]), set(filter(None, listing.split("\0"))) - NOT_PACKED)
    print("\n".join(found) or f"{sys.argv[1]}: complete")
    sys.exit(bool(found))
