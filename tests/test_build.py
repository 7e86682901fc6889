"""What setup.py compiles, and what it takes from the last build; a compiler that only takes notes stands in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dirtylog import BackendUnavailable

ROOT = Path(__file__).resolve().parent.parent
# Writes what was asked for into a log, and an empty file where the result was wanted.
COMPILER = """#!/bin/sh
for last; do [ "$previous" = -o ] && result=$last; previous=$last; done
echo "$result" >>"$COMPILED"
echo "$*" >"$result"
"""
# In place of `python -m cython`, which writes what modules share: that takes seconds and is of no interest here.
CYTHON = """
if __name__ == "__main__":
    import sys
    open(sys.argv[-1], "w").close()
else:
    from Cython.Shadow import *
"""
MODULE = 'cdef extern from "one.h":\n    int one\n\ndef answer():\n    return one\n'


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the builds happen: one after the other, as in a checkout that somebody works in."""
    return tmp_path_factory.mktemp("checkout")


@pytest.fixture(scope="module")
def build(directory):
    """Return a function that builds two modules and says which of them were compiled, and where they went."""
    tmp_path = directory
    package = tmp_path / "dirtylog"
    package.mkdir()
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "build_backend.py", tmp_path / "tools")
    (package / "__init__.py").touch()
    for name in ("alpha", "beta"):
        (package / f"{name}.pyx").write_text(MODULE)
    (package / "one.h").write_text("static int one = 1;\n")
    (tmp_path / "cython.py").write_text(CYTHON)
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o700)

    def run(library, **switches):
        compiled = tmp_path / "compiled"
        compiled.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DIRTYLOG_")}
        environment |= {"CC": str(compiler), "COMPILED": str(compiled), **switches}
        # As pip does: into a directory that is new each time.
        command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={library}"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        built = {path.name.partition(".")[0] for path in (tmp_path / library / "dirtylog").iterdir() if path.is_file()}
        assert built == {"_cython", "alpha", "beta"}
        lines = compiled.read_text().splitlines() if compiled.exists() else []
        return sorted(Path(line).stem for line in lines if line.endswith(".o"))

    return run


def test_a_second_build_compiles_what_has_changed_since_the_first_and_nothing_else(build, directory):
    assert build("first") == ["_cython", "alpha", "beta"]
    package = directory / "dirtylog"
    os.utime(package / "alpha.pyx")
    assert build("second") == []
    (package / "alpha.pyx").write_text(MODULE.replace("answer", "reply"))
    assert build("third") == ["alpha"]
    # An older time stamp than that of what was made from the last one.
    (package / "one.h").write_text("static int one = 2;\n")
    os.utime(package / "one.h", (0, 0))
    assert build("fourth") == ["alpha", "beta"]
    found = list((directory / "build").glob("*/cython/dirtylog/one.h"))
    assert [path.read_text() for path in found] == ["static int one = 2;\n"]


def test_cython_is_asked_for_and_needed_only_where_something_is_to_be_compiled(build, directory):
    without = directory / "without"
    without.mkdir()
    (without / "Cython.py").write_text("raise ImportError('hidden')\n")
    hidden = {"PYTHONPATH": str(without)}
    asked = (
        "import sys; sys.path.append('tools'); import build_backend as b; print(b.get_requires_for_build_editable())"
    )

    def answer():
        environment = {**os.environ, **hidden, "CC": str(directory / "compiler")}
        for name in [name for name in environment if name.startswith("DIRTYLOG_")]:
            del environment[name]
        done = subprocess.run(
            [sys.executable, "-c", asked], cwd=directory, env=environment, capture_output=True, text=True
        )
        return done.stdout.strip() or done.stderr

    build("with")
    assert answer() == "[]"
    assert build("without-cython", **hidden) == []
    (directory / "dirtylog" / "beta.pyx").write_text(MODULE.replace("answer", "asked"))
    assert answer() == "['cython>=3.3,<3.4']"
    with pytest.raises(AssertionError, match="1 modules are to be compiled, and Cython is not there"):
        build("refused", **hidden)
    assert build("again") == ["beta"]


def test_a_build_with_another_switch_takes_nothing_from_the_last_and_neither_does_the_next_without(build, directory):
    def flags(library):
        (module,) = (directory / library / "dirtylog").glob("alpha.*")
        return module.read_text()

    build("plain")
    assert build("plain", DIRTYLOG_SANITIZE="undefined") == ["_cython", "alpha", "beta"]
    assert "-fsanitize=undefined" in flags("plain")
    assert build("plain") == []
    assert "-fsanitize" not in flags("plain")


def test_a_portable_build_puts_a_refusal_in_the_place_of_what_needs_linux(build, directory):
    needs_linux = directory / "dirtylog" / "sources" / "kvm" / "_kvm.pyx"
    needs_linux.parent.mkdir(parents=True)
    needs_linux.write_text(MODULE)
    assert build("portable", DIRTYLOG_PORTABLE="1") == ["_cython", "alpha", "beta"]
    needs_linux.unlink()
    compiled = {path.read_text() for path in (directory / "build").rglob("alpha.o")}
    assert any("-U__linux__" in command for command in compiled)
    stand_in = directory / "portable" / "dirtylog" / "sources" / "kvm" / "_kvm.py"
    with pytest.raises(BackendUnavailable, match=r"dirtylog\.sources\.kvm\._kvm is not available here: it needs Linux"):
        exec(stand_in.read_text(), {"__name__": "dirtylog.sources.kvm._kvm"})
