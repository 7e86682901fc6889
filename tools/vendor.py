"""Take another version of the charting library that goes into every report: ``python tools/vendor.py 4.1.1``.

Asks npm for the package, and writes three files beside the report's page: the library and its licence, as they are in
the package, and ``vendored.json``, which says what they are and has their SHA-256. tests/sinks/test_report.py compares
them. Look at a report afterwards, on a desktop, on a phone and in the dark: the tests see that each chart is drawn, not
whether it is pretty.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "plotly.js-cartesian-dist-min"
TARGET = Path(__file__).resolve().parent.parent / "dirtylog" / "sinks" / "report"
FILES = {
    "plotly-cartesian.min.js": "package/plotly-cartesian.min.js",
    "plotly-LICENSE.txt": "package/LICENSE",
}


def vendor(version: str, target: Path) -> None:
    """Write the files of a version."""
    with tempfile.TemporaryDirectory() as directory:
        command = ["npm", "pack", "--silent", f"{PACKAGE}@{version}"]
        name = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout.split()[-1]
        with tarfile.open(Path(directory) / name) as archive:
            contents = {ours: archive.extractfile(theirs) for ours, theirs in FILES.items()}
            data = {ours: file.read() for ours, file in contents.items() if file is not None}
            said = archive.extractfile("package/package.json")
            package = json.load(said) if said is not None else {}
    for ours in FILES:
        (target / ours).write_bytes(data[ours])
    about = {
        "name": PACKAGE,
        "version": package["version"],
        "from": f"npm pack {PACKAGE}@{package['version']}",
        "licence": package["license"],
        "files": {ours: hashlib.sha256(data[ours]).hexdigest() for ours in FILES},
    }
    (target / "vendored.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Take the version that is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("version", help="as npm has it")
    vendor(parser.parse_args().version, TARGET)


if __name__ == "__main__":
    main()
