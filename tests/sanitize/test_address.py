"""A sanitized run reports what is planted in C code of ours, and nothing that is Python's own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
PLANTED = """
#include <stdlib.h>
void *kept;
void sound(int n) { char *block = malloc(n); block[n - 1] = 1; free(block); }
void leak(int n) { kept = malloc(n); kept = NULL; }
void overflow(int n) { char *block = malloc(n); block[n] = 1; free(block); }
int undefined(int n) { return 1 << n; }
"""


@pytest.fixture
def reports_of(tmp_path, monkeypatch):
    """Call a planted function from a watched Python; return how that ended, what was written, and what counts."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import sanitize

    log = tmp_path / "log"
    log.mkdir()
    environment = sanitize.watched(log)
    if environment is None:
        pytest.skip("gcc has no libasan.so or libubsan.so here")
    source = tmp_path / "dirtylog" / "planted.c"  # ours, by its path
    source.parent.mkdir()
    source.write_text(PLANTED)
    flags = ["-O0", "-g", "-shared", "-fPIC", "-fsanitize=address,undefined"]
    subprocess.run(["gcc", *flags, source, "-o", source.with_suffix(".so")], check=True)

    def call(name):
        code = f"import ctypes, numpy; ctypes.CDLL({str(source.with_suffix('.so'))!r}).{name}(40)"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        return done, "".join(path.read_text() for path in log.iterdir()), sanitize.reports(log)

    return call


def test_a_leak_of_ours_is_reported_and_those_of_python_are_not(reports_of):
    _, written, found = reports_of("leak")
    assert len(found) == 1
    assert "leak of 40 byte(s) in 1 object(s)" in found[0]
    # Python's own, which any run has.
    assert written.count(" leak of ") > 1


def test_sound_code_is_not_reported_though_leaks_are_looked_for(reports_of):
    done, written, found = reports_of("sound")
    assert "LeakSanitizer" in written
    assert (done.returncode, done.stderr, found) == (0, "", [])


def test_a_write_past_the_end_is_reported(reports_of):
    _, _, found = reports_of("overflow")
    assert len(found) == 1
    assert "heap-buffer-overflow" in found[0]


def test_undefined_behaviour_ends_the_process_and_says_why(reports_of):
    done, _, _ = reports_of("undefined")
    assert done.returncode == -signal.SIGABRT
    assert "shift exponent 40 is too large" in done.stderr
