"""Writers, readers, replacing, rebasing and pruning in processes beside each other: nobody sees damage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dirtylog.sinks.snapshot import catalog, clean, verify

PROGRAM = Path(__file__).with_name("neighbours.py")


def started(role, directory, seed, count):
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), role.rstrip("0123456789"), str(directory), str(seed), str(count)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip


def beside(directory, **counts):
    # There is something to read and to tidy up from the start.
    with started("writer", directory, 99, 5) as first:
        first.communicate("\n")
    processes, said = {}, {}
    try:
        for number, (role, count) in enumerate(counts.items()):
            processes[role] = started(role, directory, number, count)
        for process in processes.values():
            process.stdout.readline()
        for process in processes.values():
            process.stdin.write("\n")
            process.stdin.flush()
        for role, process in processes.items():
            said[role] = process.communicate()
    finally:
        for process in processes.values():
            with process:
                process.kill()
    for role, (_, error) in said.items():
        assert processes[role].returncode == 0, f"{role}: {error}"
    assert clean(directory) == []
    for entry in catalog(directory):
        assert entry.problem is None
        verify(entry.path)
    return {role: int(out) for role, (out, _) in said.items()}


def test_readers_beside_writers_and_tidiers_see_no_damage(tmp_path):
    done = beside(tmp_path, writer1=40, writer2=40, reader1=40, reader2=40, tidier1=30)
    assert done["reader1"] == done["reader2"] == 40
    assert done["tidier1"] > 0


@pytest.mark.stress
def test_a_hundred_thousand_reads_beside_writers_and_tidiers(tmp_path):
    done = beside(
        tmp_path, writer1=12_000, writer2=12_000, reader1=34_000, reader2=34_000, reader3=34_000, tidier1=8_000,
        tidier2=8_000,
    )  # fmt: skip
    assert sum(done[role] for role in done if role.startswith("reader")) >= 100_000
