"""The memory of a guest of QEMU: compared where it is a shared file, watched from outside where it is QEMU's own."""

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sources.qemu import Qmp

from ...qemu import FIRMWARE, WRITTEN, emulated, until_written
from ..test_process import attach

PAGE = 4096
SIZE = 16 << 20
BEGIN = 0x20 * PAGE


@pytest.fixture
def firmware(tmp_path):
    (tmp_path / "firmware").write_bytes(FIRMWARE)
    return ["-bios", tmp_path / "firmware", "-S"]


def test_a_guests_memory_in_a_shared_file_is_compared(tmp_path, firmware):
    path = tmp_path / "ram"
    options = [
        "-machine", "pc,memory-backend=m", "-object",
        f"memory-backend-file,id=m,size=16M,mem-path={path},share=on", *firmware,
    ]  # fmt: skip
    with emulated(tmp_path / "qmp", *options), Qmp(tmp_path / "qmp") as qmp:
        memory = np.memmap(path, np.uint8, "r+", shape=SIZE)
        copy = memory.copy()
        with dl.track(memory) as tracker:
            assert tracker.backend == "compare"

            def harvest():
                dirty = tracker.harvest()
                dirty.copy(memory, copy)
                return set(dirty)

            assert until_written(qmp, harvest) == set(WRITTEN)
            assert (copy == memory).all()
        # Of a round, which begins again after 256: the pages that it has come to are one ahead of the others.
        numbers = memory[BEGIN : BEGIN + 64 * PAGE : 2 * PAGE]
        assert set(numbers - numbers[-1]) <= {0, 1}


def test_a_guests_own_memory_is_watched_from_outside(tmp_path, firmware):
    with (
        emulated(tmp_path / "qmp", *firmware) as process,
        Qmp(tmp_path / "qmp") as qmp,
        attach(process.pid, select="guest") as watched,
    ):
        ram = max(watched.regions, key=lambda region: region.npages)
        assert ram.npages == SIZE // PAGE
        watched.harvest()
        held = {}

        def harvest():
            dirty = watched.harvest()
            pages = (dirty.indices() - ram.first_page).tolist()
            held.update(zip(pages, watched.read(dirty), strict=True))
            return set(pages)

        assert until_written(qmp, harvest) == set(WRITTEN)
        with open(f"/proc/{process.pid}/mem", "rb", buffering=0) as memory:
            for page, content in held.items():
                memory.seek(ram.start + page * PAGE)
                assert memory.read(PAGE) == content.tobytes(), page
