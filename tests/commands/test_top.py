"""dirtylog top: what it says of a process that writes, on a terminal and for programs."""

import json
import os
import pty
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import dirtylog as dl
from dirtylog import cli
from dirtylog.commands import _looks, top
from dirtylog.commands._screen import keys_in
from dirtylog.errors import BackendUnavailable
from dirtylog.sources.process import Region
from dirtylog.sources.process.naming import Names

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(dl.__file__).parents[1]), "TERM": "xterm", "COLUMNS": "120"}
# In a mapping of its own: what Python's allocator makes of a large object is another matter where it has no GIL.
PROGRAM = """
import mmap, sys
memory = mmap.mmap(-1, 8 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(flush=True)
for line in sys.stdin:
    for page in range(0, 8 << 20, 4096):
        memory[page] ^= 1
    print(flush=True)
"""


@pytest.fixture
def writer():
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    with process:
        assert process.stdout.readline() == "\n"
        try:
            dl.attach(process.pid).close()
        except (BackendUnavailable, PermissionError) as missing:
            process.stdin.close()
            pytest.skip(f"attaching does not work here: {missing}")
        yield process
        process.stdin.close()


def write(writer):
    writer.stdin.write("go\n")
    writer.stdin.flush()
    assert writer.stdout.readline() == "\n"


def test_a_look_counts_what_the_process_wrote(writer):
    with dl.attach(writer.pid) as process:
        watcher = _looks.Watcher([(process, Names(process.pid))])
        write(writer)
        look = watcher.look()
        assert look.exact
        assert 8 << 20 <= look.nbytes <= 9 << 20
        largest = max(look.rows, key=lambda row: row.bytes_per_second)
        assert largest.working_set_bytes >= 8 << 20
        # What one look says is one thing, seen by the second or in all.
        assert look.bytes_per_second * look.seconds == pytest.approx(look.nbytes)
        assert sum(row.bytes_per_second for row in look.rows) * look.seconds == pytest.approx(look.nbytes)
        assert set(largest.strip) <= set(_looks.BARS)
        assert "█" in largest.strip


def test_programs_get_one_line_of_json_for_each_look(writer, capsys):
    assert cli.main(["top", str(writer.pid), "--interval", "0.01", "--count", "2", "--json"]) == 0
    looks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(looks) == 2
    assert {"seconds", "nbytes", "bytes_per_second", "exact", "working_sets", "ended", "rows"} == set(looks[0])
    assert {"name", "start", "nbytes", "bytes_per_second", "working_set_bytes", "strip", "pid"} == set(
        looks[0]["rows"][0]
    )


def test_once_prints_a_table(writer, capsys):
    assert cli.main(["top", str(writer.pid), "--interval", "0.01", "--once"]) == 0
    printed = capsys.readouterr().out
    assert "working set" in printed
    assert "per second" in printed


def test_on_a_terminal_keys_sort_freeze_and_quit(writer):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "dirtylog", "top", str(writer.pid), "--interval", "0.05", "--count", "100000"]
    screen = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT)
    os.close(theirs)
    seen = ""

    def until(text):
        nonlocal seen
        while text not in seen:
            seen += os.read(ours, 65536).decode(errors="replace")
        seen = seen[seen.index(text) + len(text) :]

    with screen, kill_if_it_fails(screen):
        until("s sort by size")
        os.write(ours, b"s")
        until("s sort by address")
        os.write(ours, b"f")
        until("f go on")
        os.write(ours, b"a")
        until("anonymous")
        # An arrow is three characters, which come at once: none of them is kept for the next key.
        os.write(ours, b"\x1b[B\r")
        until("Esc all regions")
        os.write(ours, b"\x1bq")
        # Until the other end is closed: a terminal whose screen nobody reads would hold the program up.
        try:
            while os.read(ours, 65536):
                pass
        except OSError:
            pass
    os.close(ours)
    assert screen.returncode == 0


@contextmanager
def kill_if_it_fails(process):
    try:
        yield
    except BaseException:
        process.kill()
        raise


def row(name, rate, size, start, recent=1, pid=1):
    return _looks.Row(name, start, size, rate, recent, "·", pid)


def test_rows_are_sorted_as_asked_and_quiet_regions_left_out():
    rows = (row("a", 1.0, 30, 3), row("b", 3.0, 20, 1), row("c", 0.0, 10, 2, recent=0))
    look = _looks.Look(1.0, 4, 4.0, True, {}, rows)
    assert [each.name for each in top.listed(look, "rate", False)] == ["b", "a"]
    assert [each.name for each in top.listed(look, "size", True)] == ["a", "b", "c"]
    assert [each.name for each in top.listed(look, "address", True)] == ["b", "c", "a"]


def test_a_name_with_control_characters_does_not_reach_the_terminal():
    rude = Region(0, 4096, 0, 1, "file", "/tmp/\x1b]0;owned\x07", 1)
    watcher, _ = watching(Writes(1, [rude]))
    assert watcher.look().rows[0].name == "/tmp/?]0;owned?"


# ---- looks at processes that are made up, at moments that are --------------------------------------------


class Writes:
    """A process that has written what it was told to have."""

    def __init__(self, pid, regions, npages=1 << 10):
        self.pid, self.regions, self.npages, self.page_size = pid, tuple(regions), npages, 4096
        self.used_pages = max(region.first_page + region.npages for region in regions)
        self.alive = True
        self.bits = dl.DirtyBitmap(npages)

    def harvest(self):
        if not self.alive:
            raise dl.DirtyLogError(f"process {self.pid} has ended")
        return self.bits.harvest()


def watching(*processes):
    """A watcher of processes, with regions called as the kernel calls them; and the clock, whose hand is `now`."""
    clock = SimpleNamespace(now=0.0)
    return _looks.Watcher([(each, lambda regions: regions) for each in processes], clock=lambda: clock.now), clock


def two_regions(pid):
    return Writes(
        pid,
        [
            Region(0x1000000, 0x1040000, 0, 64, "heap", "[heap]", pid),
            Region(0x2000000, 0x2100000, 100, 256, "anonymous", "", pid),
        ],
    )


def test_several_processes_are_added_up_and_told_apart():
    one, two = two_regions(11), two_regions(22)
    watcher, clock = watching(one, two)
    one.bits.mark_range(0, 8)
    two.bits.mark_range(100, 24)
    clock.now = 2.0
    look = watcher.look()
    assert look.bytes_per_second == 32 * 4096 / 2
    assert look.working_sets == {"1": 32 * 4096, "10": 32 * 4096, "60": 32 * 4096}
    assert {each.name: each.bytes_per_second for each in look.rows if each.bytes_per_second} == {
        "11: [heap]": 8 * 4096 / 2,
        "22: anonymous": 24 * 4096 / 2,
    }


def test_the_end_of_one_process_is_said_and_the_others_are_looked_at_further():
    one, two = two_regions(11), two_regions(22)
    watcher, clock = watching(one, two)
    one.alive = False
    two.bits.mark(3)
    clock.now = 1.0
    look = watcher.look()
    assert look.ended == (11,)
    assert look.nbytes == 4096
    assert top.heading("both", look).startswith("both (11 ended): ")
    two.alive = False
    with pytest.raises(dl.DirtyLogError, match="22 has ended"):
        watcher.look()


def test_what_could_not_be_looked_at_is_an_error_though_it_is_one_of_several():
    one, two = two_regions(11), two_regions(22)
    watcher, _ = watching(one, two)
    one.harvest = lambda: (_ for _ in ()).throw(dl.DirtyLogError("no room"))
    with pytest.raises(dl.DirtyLogError, match="no room"):
        watcher.look()


def test_a_region_from_near_says_where_in_it_now_and_lately():
    process = two_regions(11)
    watcher, clock = watching(process)
    process.bits.mark_range(100, 64)
    clock.now = 1.0
    watcher.look()
    process.bits.mark_range(100 + 128, 32)
    process.bits.mark(0)  # of another region
    clock.now = 3.0
    look = watcher.look()
    large = next(each for each in look.rows if each.start == 0x2000000)
    detail = look.detail(large, 2, 8)
    assert detail.cell_bytes == 256 * 4096 // 16
    assert [line[0] for line in detail.lines] == [0x2000000, 0x2080000]
    assert [line[1] for line in detail.lines] == ["········", "██······"]
    assert [line[2] for line in detail.lines] == ["████····", "██······"]
    assert detail.working_sets == {"1": 32 * 4096, "10": 96 * 4096, "60": 96 * 4096}
    assert detail.rates == (64 * 4096, 32 * 4096 / 2)
    # No more characters than pages.
    assert [len(line[1]) for line in look.detail(look.rows[0], 3, 30).lines] == [30, 30, 4]


def test_what_was_seen_is_dumped_as_a_trace_of_all_processes(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")
    from dirtylog.sinks.trace import Trace

    monkeypatch.chdir(tmp_path)
    one, two = two_regions(11), two_regions(22)
    watcher, clock = watching(one, two)
    screen = top.Screen("both", [11, 22], ["./one", "./two"], 1e9)
    for clock.now in (1.0, 2.5):
        one.bits.mark_range(0, int(clock.now))
        two.bits.mark(355)
        screen.see(watcher.look())
    two.alive = False
    assert screen.press("d")
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("top-11-")
    with Trace(path) as trace:
        epochs = [(epoch.time, epoch.pages.indices().tolist()) for epoch in trace.epochs()]
        # The second process's pages follow the 356 of the first.
        assert epochs == [(1.0, [0, 711]), (2.5, [0, 1, 711])]
        assert trace.regions["11: [heap] at 0x1000000"] == (0, 64)
        assert trace.regions["22: anonymous at 0x2000000"] == (456, 256)
        assert trace.about["command"] == "./one; ./two"


def test_a_trace_that_cannot_be_written_is_a_note_on_the_screen(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")
    pytest.importorskip("rich", reason="rich (extra: cli) is not installed")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    screen, watcher, _ = screen_of(two_regions(11))
    screen.see(watcher.look())
    assert screen.press("d")
    assert "no trace: " in drawn(screen)


def screen_of(*processes):
    watcher, clock = watching(*processes)
    return top.Screen("it", [each.pid for each in processes], ["./it"], 0.0), watcher, clock


def drawn(screen, width=120, height=30, styles=False):
    from rich.console import Console

    nowhere = open(os.devnull, "w")  # noqa: SIM115
    console = Console(
        width=width, height=height, record=True, file=nowhere, force_terminal=True, color_system="standard"
    )
    with console.file:
        console.print(screen.picture(console))
        return console.export_text(styles=styles)


def test_keys_choose_a_region_and_look_at_it_from_near():
    pytest.importorskip("rich", reason="rich (extra: cli) is not installed")
    process = two_regions(11)
    screen, watcher, clock = screen_of(process)
    process.bits.mark_range(0, 3)
    process.bits.mark_range(100, 9)
    clock.now = 1.0
    screen.see(watcher.look())
    assert screen.press("down")  # the first, which is hottest
    assert screen.press("down")
    assert screen.press("enter")
    assert "[heap] at 0x1000000" in drawn(screen)
    assert screen.press("up")
    assert "anonymous at 0x2000000" in drawn(screen)
    # What was written now is bright, and what was not is faint.
    assert "\x1b[1;32m" in drawn(screen, styles=True)
    assert "\x1b[2m·" in drawn(screen, styles=True)
    assert screen.press("escape")
    assert "[heap]" in drawn(screen)
    assert "anonymous" in drawn(screen)
    # A region that is gone is not looked at from near.
    assert screen.press("enter")
    process.regions = process.regions[:1]
    clock.now = 2.0
    screen.see(watcher.look())
    assert "[heap]" in drawn(screen)
    assert not screen.press("Q")


def test_a_frozen_picture_stays_and_goes_on_with_the_latest_look():
    pytest.importorskip("rich", reason="rich (extra: cli) is not installed")
    process = two_regions(11)
    screen, watcher, clock = screen_of(process)
    clock.now = 1.0
    screen.see(watcher.look())
    assert screen.press("f")
    process.bits.mark_range(0, 16)
    clock.now = 2.0
    screen.see(watcher.look())
    assert "64.0 KiB" not in drawn(screen)
    assert screen.press("f")
    assert "64.0 KiB" in drawn(screen)


def test_a_list_longer_than_the_window_moves_with_the_chosen_region():
    pytest.importorskip("rich", reason="rich (extra: cli) is not installed")
    process = Writes(11, [Region(i << 20, (i << 20) + 4096, i, 1, "anonymous", f"r{i:02}", 11) for i in range(1, 40)])
    screen, watcher, clock = screen_of(process)
    process.bits.mark_range(1, 39)
    clock.now = 1.0
    screen.see(watcher.look())
    assert "1 to 5 of 39" in drawn(screen, height=12)
    for _ in range(20):
        screen.press("down")
    picture = drawn(screen, height=12)
    assert "16 to 20 of 39" in picture
    assert "r20" in picture
    assert "r15" not in picture
    assert len(picture.rstrip().splitlines()) <= 12
    # A window of 80 columns has no room for addresses.
    assert "address" not in drawn(screen, width=80)


def test_a_process_with_small_mappings_alone_is_said_to_have_them():
    look = _looks.Look(1.0, 0, 0.0, True, {}, ())
    assert "--all watches smaller ones too" in top.heading("it", look)
    assert "--all" not in top.heading("it", _looks.Look(1.0, 0, 0.0, True, {}, (row("a", 0.0, 1, 1),)))


def test_keys_are_told_from_what_a_terminal_sends():
    assert keys_in("s\x1b[A\x1b[1;5Bj\x1b[3~\r\x1b") == ["s", "up", "down", "j", "enter", "escape"]


def test_a_name_that_no_process_or_several_have_is_refused(capsys, writer):
    assert cli.main(["top", "no-such-program-anywhere"]) == 1
    assert "no process is called" in capsys.readouterr().err
    another = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    with another:
        another.stdout.readline()
        assert cli.main(["top", os.path.basename(sys.executable)]) == 1
        said = capsys.readouterr().err
        assert {str(writer.pid), str(another.pid)} <= set(said.split())
        # Those ids are what it takes to watch both.
        ids = [str(writer.pid), str(another.pid)]
        assert cli.main(["top", *ids, "--interval", "0.01", "--once", "--json", "--all"]) == 0
        assert {str(row["pid"]) for row in json.loads(capsys.readouterr().out)["rows"]} == set(ids)
        assert cli.main(["top", *ids, "--agent", "/nowhere"]) == 2
        assert "--agent is about one process" in capsys.readouterr().err
        another.stdin.close()


def test_a_process_that_ends_ends_the_look_with_an_error(writer, capsys):
    with dl.attach(writer.pid) as process:
        watcher = _looks.Watcher([(process, Names(process.pid))], _looks.ASCII_BARS)
        writer.stdin.close()
        writer.wait()
        with pytest.raises(dl.DirtyLogError, match="has ended"):
            watcher.look()


def test_children_are_followed_and_named_by_their_process(writer, capsys):
    shell = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {PROGRAM!r}])"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    with shell:
        assert shell.stdout.readline() == "\n"
        assert cli.main(["top", str(shell.pid), "--follow", "--interval", "0.01", "--once", "--json"]) == 0
        shell.stdin.close()
    rows = json.loads(capsys.readouterr().out)["rows"]
    own, child = ({row["pid"] for row in rows if (row["pid"] == shell.pid) is same} for same in (True, False))
    assert len(own) == len(child) == 1
    assert all(row["name"].startswith(f"{row['pid']}: ") == (row["pid"] in child) for row in rows)


def test_a_process_that_has_ended_has_no_command_line():
    from dirtylog.commands._program import command_of

    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    with pytest.raises(ProcessLookupError, match=f"process {ended.pid} has ended"):
        command_of(ended.pid)
