"""Check what a wheel carries: what other packages build against and type-check with, and no generated C."""

import sys
import zipfile
from pathlib import Path, PurePosixPath

# Hand-written C is compiled in; the .pyx are for readers of the sources.
FORBIDDEN = {".c", ".cpp", ".pyx"}


def problems(wheel: Path, root: Path) -> list[str]:
    """Compare the wheel's files with the package's sources."""
    names = {PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()}
    wanted = [
        path.relative_to(root)
        for pattern in ("*.py", "*.pxd", "*.pyi", "*.h", "py.typed")
        for path in (root / "dirtylog").rglob(pattern)
    ]
    page = root / "dirtylog" / "sinks" / "report"
    wanted += [
        path.relative_to(root) for path in page.iterdir() if path.suffix in {".css", ".html", ".js", ".json", ".txt"}
    ]
    modules = [path.relative_to(root).with_suffix("") for path in (root / "dirtylog").rglob("*.pyx")]
    built = {str(name).partition(".")[0] for name in names if name.suffix == ".so"}
    return [
        *(f"missing: {path}" for path in wanted if PurePosixPath(path) not in names),
        *(f"not built: {module}" for module in modules if str(module) not in built),
        *(f"has no place in a wheel: {name}" for name in names if name.suffix in FORBIDDEN),
        *(f"belongs to no package: {name}" for name in names if name.parts[0] in ("tests", "benchmarks", "docs")),
    ]


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]), Path(__file__).resolve().parent.parent)
    print("\n".join(found) or f"{sys.argv[1]}: complete")
    sys.exit(bool(found))
