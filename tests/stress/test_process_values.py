"""A million writes of another process, each by its value: none is missed, and hardly a page too many is reported.

Threads write while the process is harvested again and again, mappings come, grow, move and go, and children are forked.
At the end of each round the threads wait: then a copy that was kept right by the harvests alone is compared with the
memory, word by word.
"""

import mmap
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl

from ..sources.test_process import PAGE, attach

pytestmark = pytest.mark.stress
HERE = Path(__file__).parent
COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]
PAGES, THREADS, ROUNDS, EACH = 4096, 4, 100, 2500


@pytest.fixture(params=["c", "python"])
def program(request, tmp_path):
    """A program that writes in rounds, where its mapping is, and which pages of it were written."""
    if request.param == "c":
        if shutil.which(COMPILER) is None:
            pytest.skip(f"no C compiler: {COMPILER} is not on PATH")
        words = [tmp_path / "writes"]
        subprocess.run([COMPILER, "-O2", "-pthread", HERE / "writes.c", "-o", words[0]], check=True)
    else:
        words = [sys.executable, "-W", "ignore", HERE / "writes.py"]
    descriptor = os.memfd_create("marks")
    os.truncate(descriptor, PAGES)
    with mmap.mmap(descriptor, PAGES) as marks:
        # As descriptor 3, whatever its number is here.
        command = ["sh", "-c", f'exec "$@" 3<>/proc/self/fd/{descriptor}', "sh", *map(str, words), str(EACH)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[descriptor], bufsize=0
        ) as process:
            os.close(descriptor)
            yield process, int(process.stdout.readline()), marks
            process.stdin.close()


def test_a_million_writes_are_seen_by_their_values(program, stress):
    program, address, marks = program
    over_reported = written = harvests = 0
    with attach(program.pid, select=lambda area: area.kind == "anonymous", spare=1 << 14) as process:
        first = next(
            region.first_page + (address - region.start) // PAGE
            for region in process.regions
            if region.start <= address < region.end
        )
        steady = dl.DirtyPages.from_runs([[first, PAGES]], process.npages)
        copy = np.zeros((process.npages, PAGE), np.uint8)

        def everything():
            runs = sorted([region.first_page, region.npages] for region in process.regions)
            return dl.DirtyPages.from_runs(runs, process.npages)

        def take(pages):
            copy[pages.indices()] = process.read(pages)
            return pages

        process.harvest()
        take(everything())
        for _ in range(ROUNDS):
            marks[:] = bytes(PAGES)
            program.stdin.write(b"go\n")
            os.set_blocking(program.stdout.fileno(), False)
            reported = dl.DirtyPages._empty(process.npages)
            said = None
            while not said:
                said = program.stdout.read(100)
                reported |= take(process.harvest())
                harvests += 1
            assert said == b"over\n"
            os.set_blocking(program.stdout.fileno(), True)
            reported |= take(process.harvest())
            memory = process.read(everything())
            stale = np.flatnonzero((copy[everything().indices()] != memory).any(axis=1))
            assert not stale.size, f"{stale.size} pages were written and not reported, the first {stale[0]}"
            wrote = np.flatnonzero(np.frombuffer(bytes(marks), np.uint8))
            found = (reported & steady).indices() - first
            assert np.isin(wrote, found).all()
            over_reported += len(found) - len(wrote)
            written += len(wrote)
    assert over_reported <= written / 100
    assert harvests > ROUNDS
    stress.count("writes of another process", ROUNDS * THREADS * EACH)
    stress.count("harvests meanwhile", harvests)
