"""Attached to and let go of a thousand times: no descriptor, no mapping and no register of the process has changed."""

import os
import platform
import subprocess
from pathlib import Path

import pytest

from ..leaks import descriptors
from ..sources.test_process import Puppet, attach

pytestmark = pytest.mark.stress
HERE = Path(__file__).parent
ROUNDS = 1000


def held(pid):
    """Descriptors and mappings of a process, without what the mappings weigh."""
    return sorted(os.listdir(f"/proc/{pid}/fd")), Path(f"/proc/{pid}/maps").read_text()


def rounds(pid):
    before, own = held(pid), descriptors()
    stops = []
    for _ in range(ROUNDS):
        with attach(pid, select="all") as process:
            process.harvest()
            stops.append(process.stopped)
    assert held(pid) == before
    assert not descriptors() - own
    return sorted(stops)[ROUNDS // 2]


def test_a_thousand_rounds_change_no_register_of_a_process_that_turns(c_compiler, tmp_path, stress):
    if platform.machine() != "x86_64":
        pytest.skip("the program is written for the registers of x86-64")
    program = tmp_path / "registers"
    subprocess.run([c_compiler, "-O1", HERE / "registers.c", "-o", program], check=True)
    with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "turning\n"
            median = rounds(process.pid)
        finally:
            process.terminate()
        assert process.stdout.read() == "the same\n"
    stress.count("rounds", ROUNDS)
    stress.count("microseconds that a round stops it, in the median", round(median * 1e6))


def test_a_thousand_rounds_leave_a_process_that_waits_as_it_was(stress):
    with Puppet() as puppet:
        address = puppet.do("new(512)")
        before = puppet.do("descriptors()")
        rounds(puppet.pid)
        assert puppet.do("descriptors()") == before
        with attach(puppet.pid) as process:
            puppet.do(f"poke({address}, 7)")
            assert process.harvest().count >= 1
    stress.count("rounds", ROUNDS)
