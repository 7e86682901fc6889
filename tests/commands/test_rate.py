"""The commands that read a trace: `rate` says what the trace says, `report` writes its page."""

import argparse
import json
import subprocess
import sys
from importlib import import_module

import pytest

import dirtylog as dl

pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")

from dirtylog.sinks.trace import Recorder, Trace, TraceError


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.parquet"
    with Recorder(path, 1000) as recorder:
        for time, first in ((1.0, 0), (2.0, 50), (2.0, 90), (4.0, 300)):
            recorder.write(time, dl.DirtyPages.from_runs([[first, 100]], 1000))
        recorder.regions["low"] = (0, 200)
    return path


def run(name, *words):
    command = import_module(f"dirtylog.commands.{name}")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_rate_answers_in_json(trace, capsys):
    assert run("rate", trace, "--json", "--window", "2", "60", "--bandwidth", "4096000", "--downtime", "0.5") == 0
    answer = json.loads(capsys.readouterr().out)
    # The second epoch of one moment is counted with the next one.
    assert answer["bytes"] == 400 * 4096
    assert answer["seconds"] == 4.0
    assert answer["bytes_per_second"] == 100 * 4096
    assert answer["peak_bytes_per_second"] == 100 * 4096
    assert answer["working_set_bytes"] == {"2": 200 * 4096, "60": 290 * 4096}
    assert answer["regions_bytes"] == {"low": 300 * 4096}
    assert [(m["verdict"], len(m["rounds"])) for m in answer["migrations"]] == [("converges", 1)]


def test_a_last_sample_of_a_few_milliseconds_makes_no_peak(tmp_path, capsys):
    with Recorder(tmp_path / "steady", 4096) as recorder:
        for i in range(1, 25):
            recorder.write(i / 4, dl.DirtyPages.from_runs([[i * 50, 50]], 4096))
        recorder.write(6.002, dl.DirtyPages.from_runs([[0, 40]], 4096))
    assert run("rate", tmp_path / "steady", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["bytes_per_second"] == pytest.approx(200 * 4096, rel=0.05)
    # The second that ends with it holds five samples of fifty pages, not four.
    assert answer["peak_bytes_per_second"] < 1.25 * 200 * 4096


def test_rate_answers_people(trace, capsys):
    assert run("rate", trace) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "1.6 MiB dirtied in 4.00 s" in text
    assert "converges" in text


def test_start_and_end_of_the_program_are_in_the_total_and_in_no_rate(tmp_path, capsys):
    with Recorder(tmp_path / "apart", 4096) as recorder:
        for time, count in ((0.5, 512), (1.5, 2), (2.5, 2), (2.75, 1024)):
            recorder.write(time, dl.DirtyPages.from_runs([[0, count]], 4096))
        recorder.program = (0.5, 2.5)
    with Trace(tmp_path / "apart") as trace:
        assert trace.program == (0.5, 2.5)
    assert run("rate", tmp_path / "apart", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["bytes"] == 1540 * 4096
    assert answer["bytes_per_second"] == answer["peak_bytes_per_second"] == 2 * 4096
    assert (answer["start_bytes"], answer["start_seconds"]) == (512 * 4096, 0.5)
    assert (answer["end_bytes"], answer["end_seconds"]) == (1024 * 4096, 0.25)
    assert answer["working_set_bytes"]["1"] == 2 * 4096
    assert run("rate", tmp_path / "apart") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "its start, 500 ms, in neither of them" in text
    assert "its end, 250 ms, in neither of them" in text


def test_a_trace_of_a_program_that_ran_for_no_time_has_no_rate(tmp_path, capsys):
    with Recorder(tmp_path / "ended", 16) as recorder:
        recorder.write(1.0, dl.DirtyPages.from_indices([1], 16))
        recorder.program = (0.0, 0.0)
    assert run("rate", tmp_path / "ended", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["bytes_per_second"], answer["end_bytes"]) == (0.0, 4096)


def test_report_writes_its_page_next_to_the_trace(trace, capsys):
    assert run("report", trace) == 0
    page = trace.with_suffix(".html")
    assert capsys.readouterr().out == f"{page}\n"
    assert "4 s, 4 harvests" in page.read_text(encoding="utf-8")
    other = trace.with_name("other.html")
    assert run("report", trace, "--output", other, "--json") == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(other)
    assert other.stat().st_size == page.stat().st_size


@pytest.mark.parametrize("name", ["rate", "report"])
def test_what_is_no_trace_is_an_error_of_dirtylog(name, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"no trace")
    with pytest.raises(TraceError, match="not a Parquet file"):
        run(name, path)


def test_record_says_in_json_what_it_has_recorded(tmp_path, unprofiled):
    script = tmp_path / "script.py"
    script.write_text("import os\nkept = b'1' * (1 << 24)\nprint(len(kept), flush=True)\nos._exit(0)\n")
    words = ["record", "--json", str(tmp_path / "trace.parquet"), str(script)]
    done = subprocess.run([sys.executable, "-m", "dirtylog", *words], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert (done.returncode, done.stdout) == (0, f"{1 << 24}\n")
    answer = json.loads(done.stderr)
    assert answer["trace"] == words[2]
    assert answer["samples"] >= 1
    assert answer["dirtied_bytes"] >= 1 << 24
    with Trace(words[2]) as trace:
        assert trace.about["command"] == f"python {script}"
        assert set(trace.about) == {"command", "started", "machine", "watched"}


def test_a_running_process_is_metered_from_outside(capsys, unprofiled):
    # The clock begins when it has its memory: to start an interpreter takes a busy machine as long as is looked.
    write = "for i in range(0, len(m), 4096): m[i] = 1"
    program = f"m = bytearray(16 << 20)\n{write}\nprint(flush=True)\nwhile True:\n    {write}"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    with process:
        process.stdout.readline()
        try:
            assert run("rate", "--pid", process.pid, "--duration", "0.5", "--interval", "0.1", "--json") == 0
        except (dl.BackendUnavailable, PermissionError) as missing:
            pytest.skip(str(missing))
        finally:
            process.kill()
    answer = json.loads(capsys.readouterr().out)
    assert answer["bytes"] > 16 << 20
    assert answer["working_set_bytes"]["60"] >= 15 << 20


@pytest.mark.parametrize("words", [[], ["trace", "--pid", "1"]], ids=["neither", "both"])
def test_rate_reads_a_trace_or_watches_a_process(words):
    with pytest.raises(dl.DirtyLogError, match="one of them"):
        run("rate", *words)
