"""Traces beside forks, changes of directory and power cuts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dirtylog as dl
from dirtylog.sinks.trace import Recorder, Trace

pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")

PAGES = dl.DirtyPages.from_indices([1, 2, 9], 16)

FORKS = """
import os, sys
import dirtylog as dl
from dirtylog.sinks.trace import Recorder
recorder = Recorder(sys.argv[1], 16)
recorder.write(1.0, dl.DirtyPages.from_indices([1, 2, 9], 16))
if not os.fork():
    sys.exit()  # an end like any other: what it inherited is destroyed
os.wait()
recorder.write(2.0, dl.DirtyPages.from_indices([3], 16))
recorder.close()
"""


def test_the_child_of_a_fork_leaves_the_parents_trace_alone(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(dl.__file__).parents[1])}
    path = tmp_path / "trace"
    subprocess.run([sys.executable, "-c", FORKS, path], env=environment, check=True)
    with Trace(path) as trace:
        assert [epoch.pages.indices().tolist() for epoch in trace.epochs()] == [[1, 2, 9], [3]]
    assert os.listdir(tmp_path) == ["trace"]


def test_a_child_that_closes_the_parents_recorder_is_told(tmp_path):
    recorder = Recorder(tmp_path / "trace", 16)
    child = os.fork()
    if not child:
        try:
            recorder.close()
        except ValueError as error:
            os._exit("belongs to the parent" in str(error))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    recorder.close()
    assert (tmp_path / "trace").exists()


def test_a_trace_goes_where_it_was_meant_to_go(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Recorder("trace", 16) as recorder:
        recorder.write(1.0, PAGES)
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "trace"]


def test_two_recorders_of_one_name_do_not_mix(tmp_path):
    first, second = Recorder(tmp_path / "trace", 16), Recorder(tmp_path / "trace", 16)
    first.write(1.0, PAGES)
    second.write(1.0, dl.DirtyPages.from_indices([5], 16))
    first.close()
    second.close()
    with Trace(tmp_path / "trace") as trace:
        assert trace.harvest().indices().tolist() == [5]
    assert os.listdir(tmp_path) == ["trace"]


def test_a_trace_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append(str(to)), replace(self, to))[1])
    with Recorder(tmp_path / "trace", 16) as recorder:
        recorder.write(1.0, PAGES)
    assert len(done) == 3
    assert done[0].endswith(".partial")
    assert done[1:] == [str(tmp_path / "trace"), str(tmp_path)]
