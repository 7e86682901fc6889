"""Where a guest's memory is: told by QEMU's monitor, so that its pages are numbered as the guest numbers them."""

import json
import mmap

import numpy as np
import pytest

import dirtylog as dl
from dirtylog import cli
from dirtylog.sinks import snapshot
from dirtylog.sources.qemu import GuestRange, Qmp, guest_memory

from ...qemu import FIRMWARE, WRITTEN, emulated, until_written
from ..test_process import attach

PAGE = mmap.PAGESIZE
GIB = 1 << 30


class Monitor:
    """What a QEMU says of its memory: blocks by name, with address and size, and the ranges that a CPU sees."""

    version = "7.2.0"

    def __init__(self, blocks, *ranges, before=""):
        self.blocks = blocks
        lines = [
            f"  {first:016x}-{first + size - 1:016x} (prio {prio}, {kind}): {name}{rest}"
            for first, size, kind, name, offset in ranges
            for prio in ["-1" if kind == "rom" else "0"]
            for rest in [f" @{offset:016x} KVM" if offset else ""]
        ]
        self.ranges = ranges
        view = '\n AS "memory", root: system\n AS "cpu-memory-0", root: system\n Root memory region: system\n'
        self.text = f"{before}FlatView #1{view}" + "\r\n".join(lines) + '\n\nFlatView #2\n AS "I/O", root: io\n'

    def execute(self, command, arguments=None):
        if command == "query-memdev":
            return [{"id": name.rpartition("/")[2], "size": size} for name, (_, size) in self.blocks.items()]
        line = arguments["command-line"]
        if line == "info mtree -f":
            return self.text
        assert line.startswith("gpa2hva ")
        gpa = int(line.split()[1], 16)
        first, _, _, name, offset = next(each for each in self.ranges if each[0] <= gpa < each[0] + each[1])
        return f"Host virtual address for {gpa:#x} ({name}) is {self.blocks[name][0] + offset + gpa - first:#x}\r\n"


def test_memory_around_the_hole_for_devices_has_the_numbers_that_the_guest_gives_it():
    ram = 0x7F00_0000_0000
    monitor = Monitor(
        {"pc.ram": (ram, 4 * GIB)},
        (0, 0xA0000, "ram", "pc.ram", 0),
        (0xA0000, 0x20000, "i/o", "vga-lowmem", 0),
        (0xC0000, 0x20000, "rom", "pc.rom", 0),
        (0xE0000, 0x20000, "rom", "pc.bios", 0x20000),
        (0x100000, 3 * GIB - 0x100000, "ram", "pc.ram", 0x100000),
        (0xFD000000, 0x1000000, "ram", "vga.vram", 0),  # RAM of a card is no memory of the guest
        (0xFFFC0000, 0x40000, "rom", "pc.bios", 0),
        (4 * GIB, GIB, "ram", "pc.ram", 3 * GIB),
    )
    # What lies behind the screen and the ROM may be shown later: it is memory of the guest all the same.
    assert guest_memory(monitor) == [
        GuestRange(ram, ram + 3 * GIB, 0),
        GuestRange(ram + 3 * GIB, ram + 4 * GIB, 4 * GIB // PAGE),
    ]


def test_another_view_is_not_taken_for_what_a_cpu_sees():
    other = (
        'FlatView #0\n AS "piix3-ide", root: bus master container\n Root memory region: bus master container\n'
        "  0000000000000000-0000000000ffffff (prio 0, ram): pc.ram @0000000000f00000\n\n"
    )
    ram = 0x7F00_0000_0000
    monitor = Monitor({"/objects/pc.ram": (ram, 16 << 20)}, (0, 16 << 20, "ram", "/objects/pc.ram", 0), before=other)
    assert guest_memory(monitor) == [GuestRange(ram, ram + (16 << 20), 0)]


def test_memory_that_is_hidden_where_something_else_is_seen_has_numbers_of_its_own():
    a, b = 0x7F00_0000_0000, 0x7E00_0000_0000
    monitor = Monitor(
        {"a": (a, 4 * PAGE), "b": (b, 2 * PAGE), "unplugged": (0, PAGE)},
        (0, 2 * PAGE, "ram", "a", 0),
        (2 * PAGE, 2 * PAGE, "ram", "b", 0),  # in front of the rest of a
        (9 * PAGE, 2 * PAGE, "ram", "b", 0),  # once more
    )
    assert guest_memory(monitor) == [
        GuestRange(a, a + 2 * PAGE, 0),
        GuestRange(b, b + 2 * PAGE, 2),
        GuestRange(a + 2 * PAGE, a + 4 * PAGE, 4),
    ]


def test_a_part_of_a_page_is_not_numbered_by_where_it_is_seen():
    ram = 0x7F00_0000_0000
    monitor = Monitor(
        {"m": (ram, 3 * PAGE)}, (0, PAGE + 16, "ram", "m", 0), (PAGE + 32, 2 * PAGE - 32, "ram", "m", PAGE + 32)
    )
    assert guest_memory(monitor) == [GuestRange(ram, ram + 3 * PAGE, 0)]


def test_a_monitor_that_does_not_say_where_memory_is_is_refused():
    with pytest.raises(dl.DirtyLogError, match=r"tells of no memory that its guest has.*\(m\)"):
        guest_memory(Monitor({"m": (0, PAGE)}, (0, PAGE, "i/o", "m", 0)))
    monitor = Monitor({"m": (1 << 40, PAGE)}, (0, PAGE, "ram", "m", 0))
    said = monitor.execute
    for answer in ("Memory at address 0x0 is not RAM\r\n", "Host virtual address for 0x0 (other) is 0x1000"):
        monitor.execute = lambda command, arguments=None, answer=answer: (
            answer if "gpa2hva" in str(arguments) else said(command, arguments)
        )
        with pytest.raises(dl.DirtyLogError, match="does not say where the memory at guest address 0x0 is"):
            guest_memory(monitor)
    monitor = Monitor({"m": (12345, PAGE)}, (0, PAGE, "ram", "m", 0))
    with pytest.raises(dl.DirtyLogError, match="begins at"):
        guest_memory(monitor)


# ---- real guests -----------------------------------------------------------------------------------------


@pytest.fixture
def guest(tmp_path):
    """A guest whose firmware writes, and memory that is plugged in at 4 GiB, with its monitor."""
    (tmp_path / "firmware").write_bytes(FIRMWARE)
    plugged = [
        "-m",
        "16M,slots=1,maxmem=64M",
        "-object",
        "memory-backend-ram,id=dimm,size=8M",
        "-device",
        "pc-dimm,memdev=dimm",
    ]
    with (
        emulated(tmp_path / "qmp", *plugged, "-bios", tmp_path / "firmware", "-S") as process,
        Qmp(tmp_path / "qmp") as qmp,
    ):
        yield process.pid, qmp


def test_pages_of_a_guest_are_the_guests_own_pages(guest, tmp_path):
    pid, qmp = guest
    with attach(pid, select=guest_memory(qmp)) as process:
        assert process.npages == (4 * GIB + (8 << 20)) // PAGE
        assert sum(region.npages for region in process.regions) == (24 << 20) // PAGE
        process.harvest()
        assert until_written(qmp, lambda: set(process.harvest())) == set(WRITTEN)
        # As the guest has it at those addresses.
        for page in (WRITTEN[0], WRITTEN[-1]):
            path = tmp_path / "page"
            qmp.execute("pmemsave", {"val": page * PAGE, "size": PAGE, "filename": str(path)})
            content = process.read(dl.DirtyPages.from_indices([page], process.npages))
            assert content.tobytes() == path.read_bytes()
            assert content.any()


def test_a_snapshot_of_a_guest_is_its_memory_from_address_zero_on(guest, tmp_path):
    pid, qmp = guest
    attach(pid).close()
    with attach(pid, select=guest_memory(qmp)) as process:
        until_written(qmp, lambda: set(process.harvest()))
    from dirtylog.sinks.snapshot.processes import diff_process, save_process

    places = guest_memory(qmp)
    save_process(tmp_path / "full", pid, select=places, sync=False)
    qmp.execute("cont")
    qmp.execute("stop")
    about = diff_process(tmp_path / "diff", pid, parent=tmp_path / "full", select=places, sync=False)
    assert about.npages == (4 * GIB + (8 << 20)) // PAGE
    qmp.execute("pmemsave", {"val": 0, "size": 1 << 20, "filename": str(tmp_path / "low")})
    low = np.fromfile(tmp_path / "low", np.uint8)
    with snapshot.open(tmp_path / "diff") as mapped:
        # The last 256 KiB below a MiB are ROM, which is no memory of the guest.
        assert (np.asarray(mapped)[:0xC0000] == low[:0xC0000]).all()


def test_the_commands_watch_a_guest_by_its_monitor(guest, tmp_path, capsys):
    pid, qmp = guest
    attach(pid).close()
    qmp.close()  # a monitor serves one at a time
    where = str(tmp_path / "qmp")
    assert cli.main(["top", str(pid), "--qmp", where, "--once", "--interval", "0.01", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert sorted(row["nbytes"] for row in rows) == [8 << 20, 16 << 20]
    assert all("guest RAM" in row["name"] for row in rows if row["nbytes"] == 16 << 20)
    assert cli.main(["snapshot", "save", str(tmp_path / "s"), "--pid", str(pid), "--qmp", where, "--no-sync"]) == 0
    assert snapshot.info(tmp_path / "s").npages == (4 * GIB + (8 << 20)) // PAGE


def test_words_that_do_not_go_with_a_monitor_are_refused(capsys):
    for words in (
        ["top", "1", "2", "--qmp", "x"],
        ["top", "1", "--qmp", "x", "--all"],
        ["record", "--qmp", "x", "trace", "script.py"],
        ["snapshot", "save", "s", "image", "--qmp", "x"],
        ["snapshot", "save", "s", "--pid", "1", "--qmp", "x", "--select", "all"],
    ):
        assert cli.main(words) == 2, words
        assert "--qmp" in capsys.readouterr().err
