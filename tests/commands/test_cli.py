"""The command line: what it prints, for people and for programs, and its exit codes."""

import io
import json
import os
import re
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest

import dirtylog as dl
from dirtylog import cli
from dirtylog.commands import _terminal, demo, info

SMALL = ["--size", "1", "--rounds", "3", "--interval", "0"]


def run(capsys, *words):
    code = cli.main(words)
    return code, *capsys.readouterr()


def exit_code(*words):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    return caught.value.code


@pytest.mark.parametrize("command", [(), *((name,) for name in cli.COMMANDS)], ids=" ".join)
def test_help_names_the_exit_codes(capsys, command):
    assert exit_code(*command, "--help") == 0
    printed = capsys.readouterr().out
    assert "exit codes:" in printed
    assert "this machine lacks a facility" in printed


def test_help_has_a_line_for_every_command(capsys):
    exit_code("--help")
    printed = capsys.readouterr().out
    for name in cli.COMMANDS:
        # After a long name the text begins on the next line.
        assert re.search(rf"^    {name}\s+\S", printed, re.MULTILINE)


@pytest.mark.parametrize(
    "words", [(), ("nonsense",), ("demo", "--size", "0"), ("demo", "--size", "x"), ("demo", "--rounds", "-1")]
)
def test_a_command_line_that_is_not_understood_is_exit_code_2(capsys, words):
    assert exit_code(*words) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("rate", "one of them"),
        ("rate trace --pid 1", "one of them"),
        ("rate trace --agent socket", "name one by --pid"),
        ("record trace", "no program to watch"),
        ("profile --pid 1 program", "watch one of them"),
        ("profile --agent socket program", "name one by --pid"),
        ("snapshot save image", "one of them"),
        ("snapshot save image memory --freeze", "name one by --pid"),
    ],
)
def test_words_that_do_not_go_together_are_exit_code_2_too(capsys, words, complaint):
    code, _, said = run(capsys, *words.split())
    assert (code, complaint in said) == (2, True), said


@pytest.mark.parametrize("words", ["top {}", "rate --pid {}", "profile --pid {}", "record --pid {} trace"])
def test_a_process_that_cannot_be_watched_is_refused_in_a_sentence(capsys, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    code, _, said = run(capsys, *words.format(os.getpid()).split())
    assert code == cli.FAILED
    assert said.startswith("dirtylog: ")
    assert "this process itself" in said
    assert list(tmp_path.iterdir()) == []


def test_a_command_waits_for_no_other_ones_imports(monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "import_module", lambda name: asked.append(name) or import_module(name))
    assert cli.main(["info", "--json"]) == 0
    assert asked == ["dirtylog.commands.info"]


def test_ctrl_c_while_a_command_is_imported_is_no_traceback(monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert cli.main(["info"]) == cli.INTERRUPTED


def test_a_page_does_not_take_the_place_of_its_trace(capsys, tmp_path):
    trace = tmp_path / "run.html"
    trace.write_bytes(b"a trace")
    code, _, said = run(capsys, "report", str(trace))
    assert (code, "--output" in said) == (2, True)
    assert trace.read_bytes() == b"a trace"


def test_a_trace_that_cannot_be_written_is_named(capsys, tmp_path):
    pytest.importorskip("pyarrow")
    trace = str(tmp_path / "none" / "trace")
    code, _, said = run(capsys, "record", trace, "-c", "pass")
    assert (code, said) == (1, f"dirtylog: [Errno 2] No such file or directory: {trace!r}\n")


def test_more_writers_than_a_machine_has_vcpus_are_refused_before_a_thread_starts(capsys):
    assert exit_code("demo", "--writers", "100000") == 2
    assert "100000 is too large; it must be at most 1024" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("profile --interval 0 x.py", "argument --interval: 0 is too small; it must be more than 0"),
        ("profile --every 1,x x.py", "argument --every: 'x' is not a number"),
        ("profile --every 0 x.py", "argument --every: 0 is too small"),
        ("record --interval nan t.parquet x.py", "argument --interval: nan is not a number that is finite"),
        ("rate t.parquet --bandwidth 0", "argument --bandwidth: 0 is too small"),
        ("rate --bandwidth 1e9 t.parquet", "argument --bandwidth: 't.parquet' is not a number"),
        ("rate t.parquet --window -1", "argument --window: -1 is too small"),
        ("report t.parquet --downtime -1", "argument --downtime: -1 is too small; it must be at least 0"),
        ("demo --interval nan", "argument --interval: nan is not a number that is finite"),
        ("demo --rounds 1.5", "argument --rounds: '1.5' is not a whole number"),
        (f"rate t.parquet --bandwidth {'9' * 400}", "argument --bandwidth: "),
        (f"profile --interval {'9' * 400} x.py", "argument --interval: "),
    ],
)
def test_a_number_out_of_its_bounds_is_refused_by_name_before_anything_has_begun(capsys, words, complaint):
    assert exit_code(*words.split()) == 2
    assert complaint in capsys.readouterr().err


def test_the_version_is_the_packages(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out.strip() == f"dirtylog {dl.__version__}"


def test_info_has_an_answer_for_every_facility(capsys):
    code, printed, _ = run(capsys, "info", "--json")
    found = {facility["name"]: facility for facility in json.loads(printed)["facilities"]}
    assert code == 0
    assert {"KVM", "userfaultfd", "PAGEMAP_SCAN", "soft-dirty", "SIMD"} <= set(found)
    assert all(facility["answer"] for facility in found.values())


def test_info_for_people_names_the_same_facilities(capsys):
    _, printed, _ = run(capsys, "info")
    for facility in info.facilities():
        assert facility.name in printed


def test_info_says_why_kvm_is_not_there(capsys, monkeypatch):
    from dirtylog.sources import kvm

    probe = kvm.probe
    monkeypatch.setattr(kvm, "probe", lambda: probe("/dev/null"))
    code, printed, _ = run(capsys, "info", "--json")
    (missing,) = (f for f in json.loads(printed)["facilities"] if f["name"].startswith("KVM"))
    assert code == 0
    assert not missing["available"]
    assert "/dev/null" in missing["answer"]


def test_demo_proves_every_replica_equal(capsys):
    code, printed, _ = run(capsys, "demo", *SMALL, "--json")
    shown = json.loads(printed)
    assert code == 0
    assert all(source["equal"] for source in shown["sources"])
    assert sum(sum(source["dirty_pages"]) for source in shown["sources"]) > 0
    for source in shown["sources"]:
        assert source["bytes_copied"] == sum(source["dirty_pages"]) * source["page_size"]
        assert source["bytes_held"] == 1 << 20
    assert shown["unavailable"] or len(shown["sources"]) == 2


def test_demo_shows_people_a_table(capsys):
    code, printed, _ = run(capsys, "demo", *SMALL)
    assert code == 0
    for label in ("pages", "dirty pages", "harvest time", "bytes copied", "bytes held", "speed-up", "byte for byte"):
        assert label in printed


def test_demo_without_userfaultfd_says_so_and_shows_the_model(capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise dl.BackendUnavailable("userfaultfd", "userfaultfd(2): ENOSYS")

    monkeypatch.setattr(dl, "track", refuse)
    code, printed, said = run(capsys, "demo", *SMALL, "--json")
    shown = json.loads(printed)
    assert code == 0
    assert "ENOSYS" in said
    assert "ENOSYS" in shown["unavailable"]
    assert [source["source"].split(",")[0] for source in shown["sources"]] == ["model VM"]


def test_demo_that_copies_too_little_is_found_out_and_fails(capsys, monkeypatch):
    monkeypatch.setattr(demo, "copy_pages", lambda dirty, memory, replica: dirty.nbytes)
    code, printed, _ = run(capsys, "demo", *SMALL)
    assert code == cli.FAILED
    assert "NO" in printed


def test_a_failing_writer_is_not_passed_over():
    def write(writer, pages):
        raise OSError(5, "disk on fire")

    writers = demo.Writers(write, 2, 10, batch=1, pause=0)
    with pytest.raises(OSError, match="disk on fire"), writers:
        pass


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (dl.BackendUnavailable("KVM", "open(/dev/kvm): ENOENT"), 3),
        (dl.DirtyLogError("out of epochs"), 1),
        (OSError(28, "No space left on device"), 1),
        (MemoryError(), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_goes_wrong_is_an_exit_code_and_a_line_not_a_traceback(capsys, monkeypatch, error, code):
    def fail(args):
        raise error

    monkeypatch.setattr(info, "run", fail)
    assert cli.main(["info"]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert str(error) in said


def test_a_bug_is_not_hidden(monkeypatch):
    def fail(args):
        raise ZeroDivisionError

    monkeypatch.setattr(info, "run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


def test_the_module_runs_as_the_script_does():
    done = subprocess.run([sys.executable, "-m", "dirtylog", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"dirtylog {dl.__version__}"


def test_a_reader_that_leaves_early_is_no_traceback():
    code = "import sys; from dirtylog import cli; sys.exit(cli.main(['info', '--json']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == cli.FAILED


def test_a_line_to_somebody_else_that_breaks_is_said(capsys, monkeypatch):
    def breaks(args):
        raise BrokenPipeError(32, "Broken pipe", "/run/qmp")

    monkeypatch.setattr(info, "run", breaks)
    code, _, complaint = run(capsys, "info")
    assert code == cli.FAILED
    assert complaint == "dirtylog: [Errno 32] Broken pipe: '/run/qmp'\n"


def test_a_closed_output_is_a_line_and_not_a_traceback(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["info"]) == cli.FAILED
    assert capsys.readouterr().err.startswith("dirtylog: standard output is closed")


@pytest.mark.parametrize(("encoding", "text"), [("ascii", "12.3 us"), ("utf-8", "12.3 µs")])
def test_microseconds_are_written_as_the_output_can(monkeypatch, encoding, text):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert _terminal.seconds_text(12.3e-6) == text


def test_tables_are_plain_where_rich_is_not_installed(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    _terminal.show_table("Pages", ["state", "pages"], [["dirty", "12"]])
    assert capsys.readouterr().out == "Pages\nstate  pages\n-----  -----\ndirty     12\n"


def test_a_table_of_very_many_rows_is_plain_and_quick(capsys, monkeypatch):
    monkeypatch.setattr(_terminal, "table", None)
    _terminal.show_table("Pages", ["state", "pages"], [["dirty", str(i)] for i in range(_terminal.MANY + 1)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Pages", "state  pages"]
    assert lines[-1] == "dirty    500"


def test_progress_is_for_terminals_alone(capsys):
    assert list(_terminal.with_progress(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_copying_more_pages_than_one_chunk_copies_them_all():
    memory = np.arange(3 * demo.CHUNK_PAGES, dtype=np.uint64).astype(np.uint8).reshape(-1, 1).repeat(8, axis=1)
    replica = np.zeros_like(memory)
    pages = dl.DirtyPages.from_runs([(1, len(memory) - 2)], len(memory), 8)
    assert demo.copy_pages(pages, memory, replica) == pages.nbytes
    assert np.array_equal(replica[1:-1], memory[1:-1])
    assert not replica[0].any()
    assert not demo.equal_bytes(memory, replica) or not memory[[0, -1]].any()


def test_a_whole_number_that_no_float_holds_is_read_and_held_to_its_bounds():
    from argparse import ArgumentTypeError

    from dirtylog.commands._numbers import at_least

    assert at_least(1, int)("9" * 400) == 10**400 - 1
    with pytest.raises(ArgumentTypeError, match=r"too large; it must be at most 10$"):
        at_least(1, int, 10)("9" * 400)


@pytest.mark.parametrize("option", ["--pid", "--duration", "-x"])
def test_an_option_in_the_place_of_the_program_is_said_to_be_there(option, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["record", "trace", option, "1"]) == 2
    said = capsys.readouterr().err
    assert f"{option!r} stands where the program is to be named" in said
    assert cli.main(["record", "trace", "--", option, "1"]) in (1, 3)  # a program that is called so
    assert "stands where" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
