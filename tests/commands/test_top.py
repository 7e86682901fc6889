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
from dirtylog.commands import top
from dirtylog.errors import BackendUnavailable
from dirtylog.sources.process import Region
from dirtylog.sources.process.naming import Names

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(dl.__file__).parents[1]), "TERM": "xterm", "COLUMNS": "120"}
PROGRAM = """
import sys
memory = bytearray(8 << 20)
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
        watcher = top.Watcher(process, top.BARS, Names(process.pid))
        write(writer)
        look = watcher.look()
        assert look.exact
        assert 8 << 20 <= look.nbytes <= 9 << 20
        largest = max(look.rows, key=lambda row: row.bytes_per_second)
        assert largest.working_set_bytes >= 8 << 20
        # What one look says is one thing, seen by the second or in all.
        assert look.bytes_per_second * look.seconds == pytest.approx(look.nbytes)
        assert sum(row.bytes_per_second for row in look.rows) * look.seconds == pytest.approx(look.nbytes)
        assert set(largest.strip) <= set(top.BARS)
        assert "█" in largest.strip


def test_programs_get_one_line_of_json_for_each_look(writer, capsys):
    assert cli.main(["top", str(writer.pid), "--interval", "0.01", "--count", "2", "--json"]) == 0
    looks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(looks) == 2
    assert {"seconds", "nbytes", "bytes_per_second", "exact", "working_sets", "rows"} == set(looks[0])


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
        os.write(ours, b"q")
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


def row(name, rate, size, start, recent=1):
    return top.Row(name, start, size, rate, recent, "·")


def test_rows_are_sorted_as_asked_and_quiet_regions_left_out():
    rows = (row("a", 1.0, 30, 3), row("b", 3.0, 20, 1), row("c", 0.0, 10, 2, recent=0))
    look = top.Look(1.0, 4, 4.0, True, {}, rows)
    assert [cells[0] for cells in top.cells(look, "rate", False)] == ["b", "a"]
    assert [cells[0] for cells in top.cells(look, "size", True)] == ["a", "b", "c"]
    assert [cells[0] for cells in top.cells(look, "address", True)] == ["b", "c", "a"]


def test_a_name_with_control_characters_does_not_reach_the_terminal():
    unwritten = dl.DirtyPages.from_indices([], 1)
    rude = Region(0, 4096, 0, 1, "file", "/tmp/\x1b]0;owned\x07")
    watcher = top.Watcher.__new__(top.Watcher)
    watcher._bars, watcher._process = top.BARS, SimpleNamespace(pid=1)
    name = watcher._row(rude, unwritten, unwritten, 1.0).name
    assert name == "/tmp/?]0;owned?"


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
        assert str(writer.pid) in said
        assert str(another.pid) in said
        another.stdin.close()


def test_a_process_that_ends_ends_the_look_with_an_error(writer, capsys):
    with dl.attach(writer.pid) as process:
        watcher = top.Watcher(process, top.ASCII_BARS, Names(process.pid))
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
