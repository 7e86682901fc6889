"""Every parser against the inputs that are kept, under a guard: so much memory, one directory, nothing executed."""

import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import NAMES

from .. import warm
from ..sinks.test_migrate_postcopy import guarded

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {"footer": "xxhash", "snapshot": "xxhash", "trace": "pyarrow", "migration": "zstandard"}


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def fuzz(*arguments):
    return warm.run("import runpy; runpy.run_module('fuzz', run_name='__main__', alter_sys=True)", *arguments, cwd=ROOT)


def guards(target):
    """Skip where memory that is filled cannot be guarded."""
    if target == "postcopy" and (why := guarded()):
        pytest.skip(why)


@pytest.mark.parametrize("target", NAMES)
def test_what_is_kept_is_read_rightly_or_refused(target, tmp_path):
    for module in ("pyarrow", "xxhash", "zstandard"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    guards(target)
    done = fuzz(target, "--replay", "--findings", str(tmp_path))
    assert done.returncode == 0, done.stderr
    accepted = int(done.stdout.split()[1])
    assert accepted > 0, done.stdout


@pytest.mark.parametrize("target", NAMES)
def test_hundreds_of_new_inputs_are_read_rightly_or_refused(target, tmp_path):
    for module in ("pyarrow", "xxhash", "zstandard"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    guards(target)
    # Each input of a device is a connection of its own.
    runs = 100 if target == "vhost" else 400
    done = fuzz(target, "--engine", "own", "--runs", str(runs), "--findings", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"{target}: {runs} inputs" in done.stdout


PRELUDE = """
import os, pickle, subprocess, sys
from pathlib import Path
from fuzz.guard import Guard, Violation, limit_memory
inside = Path(sys.argv[1])
(inside / "here").write_bytes(b"x")
guard = Guard()
"""


@pytest.mark.parametrize(
    "act",
    [
        "open('/etc/hostname').read()",
        "open(inside / 'new', 'wb')",
        "os.open(inside / 'new', os.O_CREAT | os.O_WRONLY)",
        "open(inside / '..' / 'other')",
        "(inside / 'here').unlink()",
        "os.rename(inside / 'here', inside / 'there')",
        "os.system('true')",
        "subprocess.run(['true'])",
        "os.fork()",
        "exec('1')",
        "eval('1')",
        "__import__('wave')",
        "pickle.loads(b'cos\\nsystem\\n.')",
    ],
)
def test_the_guard_sees_what_reading_must_not_do(tmp_path, act):
    attempt = f"try:\n    with guard.armed(inside):\n        {act}\nexcept Violation as seen:\n    print('seen', seen)"
    code = f"{PRELUDE}\n{attempt}"
    done = python("-c", code, str(tmp_path))
    assert done.stdout.startswith("seen"), done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_the_guard_lets_the_directorys_files_be_read(tmp_path):
    code = f"{PRELUDE}\nwith guard.armed(inside):\n    print(open(inside / 'here').read())"
    assert python("-c", code, str(tmp_path)).stdout == "x\n"


def test_the_limit_is_noticed(tmp_path):
    # More than the allocator of a Python without a GIL has set aside by then: a GiB.
    code = f"{PRELUDE}\nlimit_memory(1 << 26)\nbytearray(1 << 25)\nprint('ok')\nbytearray(1 << 31)"
    done = python("-c", code, str(tmp_path))
    assert done.stdout == "ok\n"
    assert "MemoryError" in done.stderr


def test_the_engine_finds_a_branch_behind_three_others(tmp_path):
    """Guided by coverage: blind, three bytes that must fit would take 2**24 inputs."""
    (tmp_path / "victim.py").write_text(
        "def check(data):\n"
        "    if data[:1] == b'A':\n"
        "        if data[1:2] == b'@':\n"
        "            if data[2:3] == b'\\x80':\n"
        "                raise KeyError('found')\n"
        "    return True\n"
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from victim import check\nfrom fuzz.engine import fuzz\n"
        "try:\n    fuzz(check, [b'a___'], runs=200_000, seed=1, part='victim.py')\n"
        "except KeyError as error:\n    print(error, error.data[:3])"
    )
    done = python("-c", code, str(tmp_path))
    assert done.stdout == "'found' b'A@\\x80'\n", done.stderr


def test_a_finding_is_kept_and_fails_the_run(tmp_path):
    code = (
        "import sys, runpy\nfrom dirtylog.sinks.snapshot import footer\n"
        "real = footer._integer\n"
        "def broken(value, low, high, what):\n"
        "    if what.endswith('length') and value > 1 << 20: raise KeyError(value)\n"
        "    return real(value, low, high, what)\n"
        "footer._integer = broken\n"
        "sys.argv = ['fuzz', 'footer', '--engine', 'own', '--runs', '10000', '--findings', sys.argv[1]]\n"
        "runpy.run_module('fuzz', run_name='__main__')"
    )
    done = python("-c", code, str(tmp_path))
    assert done.returncode == 1
    assert "KeyError" in done.stderr
    assert len(list(tmp_path.iterdir())) == 1
