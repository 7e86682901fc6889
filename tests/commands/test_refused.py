"""Where nobody may trace, as in a container: a Python program hands its memory over, and others are refused by name."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dirtylog as dl

# Answers EPERM (0x50001) to ptrace(2), as the profile of a container does; then is one command after the other.
WATCHER = """
import ctypes, json, sys
class Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint)]
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filters", ctypes.POINTER(Filter))]
number, refuse, allow = Filter(0x20, 0, 0, 0), Filter(6, 0, 0, 0x50001), Filter(6, 0, 0, 0x7fff0000)
filters = (Filter * 4)(number, Filter(0x15, 0, 1, 101), refuse, allow)
libc = ctypes.CDLL(None)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(Program(4, filters)), 0, 0):
    sys.exit("no filter of system calls can be set here")
from dirtylog.cli import main
for words in json.loads(sys.argv[1]):
    print("code", main(words), flush=True)
"""
SCRIPT = """
import sys
a = bytearray(8 << 20)
for page in range(0, len(a), 4096): a[page] = 1
print(sys.argv, __name__, flush=True)
sys.exit(5)
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter names a system call of x86-64 by its number")
def test_a_python_program_is_watched_without_ptrace_and_others_are_refused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    profile = ["profile", "--json", "--interval", "0.2", "--output"]
    commands = [
        [*profile, str(tmp_path / "whole"), str(script), "--flag"],
        [*profile, str(tmp_path / "lost"), "--arrays", "-c", "import os; os._exit(3)"],
        ["profile", "--", "/bin/true"],
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(dl.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", WATCHER, json.dumps(commands)], capture_output=True, text=True, env=environment
    )
    if "no filter" in done.stderr or "userfaultfd" in done.stderr:
        pytest.skip(f"a program cannot hand its memory over here: {done.stderr}")
    assert done.stdout.splitlines() == [f"{[str(script), '--flag']} __main__", "code 5", "code 3", "code 3"], (
        done.stderr
    )
    assert "hands its memory over by itself" in done.stderr
    assert "only a Python program can be watched without ptrace" in done.stderr
    whole, lost = (json.loads((tmp_path / name).read_text()) for name in ("whole", "lost"))
    # What was written last is in it: the program waits for the last look.
    assert 8 << 20 <= whole["dirtied_bytes"] < 14 << 20
    assert whole["missed"] is None
    assert "has ended" in lost["missed"]


ENDS_WITH_THE_FIRST_LOOK = """
import os, sys
from dirtylog import BackendUnavailable, cli
from dirtylog.sinks.profile import Sampler
from dirtylog.sources.process import launch
def refuse(*_, **__):
    raise BackendUnavailable("watching a program", "not here")
launch.launch = refuse
sample = Sampler.sample
def late(sampler, *args, part="program", **options):
    if part == "start":
        os.write(go, b"!")
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    return sample(sampler, *args, part=part, **options)
Sampler.sample = late
ready, go = os.pipe()
os.set_inheritable(ready, True)
program = f"import os; os.read({ready}, 1); os._exit(3)"
sys.exit(cli.main(["profile", "--json", "--output", sys.argv[1], "-c", program]))
"""


def test_a_program_that_ends_just_before_the_first_look_keeps_its_exit_code(tmp_path):
    command = [sys.executable, "-c", ENDS_WITH_THE_FIRST_LOOK, str(tmp_path / "profile")]
    environment = {**os.environ, "PYTHONPATH": str(Path(dl.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "userfaultfd" in done.stderr:
        pytest.skip(f"a program cannot hand its memory over here: {done.stderr}")
    assert done.returncode == 3, done.stderr
    assert "has ended" in json.loads((tmp_path / "profile").read_text())["missed"]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter names a system call of x86-64 by its number")
def test_a_program_does_not_begin_before_it_is_traced_even_if_that_ends_the_watcher(tmp_path):
    began = tmp_path / "began"
    ended = WATCHER.replace("0x50001", "0x80000000")  # SECCOMP_RET_KILL_PROCESS
    commands = [["profile", "--", "/bin/touch", str(began)]]
    environment = {**os.environ, "PYTHONPATH": str(Path(dl.__file__).parents[1])}
    # The program has our pipes: they end when it has.
    done = subprocess.run(
        [sys.executable, "-c", ended, json.dumps(commands)], capture_output=True, text=True, env=environment
    )
    if done.returncode != -signal.SIGSYS:
        pytest.skip(f"no filter can end a process here: {done.stderr}")
    assert not began.exists()
