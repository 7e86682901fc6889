"""Traces of many machines: what all say of a policy is what each says, summed up; none is left out in silence."""

import argparse
import json
import math
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

import numpy as np
import pytest

import dirtylog as dl

pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")

from dirtylog.commands import rate
from dirtylog.fleet.traces import chunks_of, sweep
from dirtylog.sinks.trace import Recorder, Trace, what_if

NPAGES = 4096


def record(path, rng, seconds=30):
    path.parent.mkdir(parents=True, exist_ok=True)
    with Recorder(path, NPAGES) as recorder:
        for second in range(1, seconds + 1):
            first = int(rng.integers(0, NPAGES - 300))
            recorder.write(float(second), dl.DirtyPages.from_runs([[first, 1 + int(rng.integers(0, 299))]], NPAGES))
    return path


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    directory, rng = tmp_path_factory.mktemp("fleet"), np.random.default_rng(4)
    for name in ("a.parquet", "b.trace", "rack/c", "short.parquet"):
        record(directory / name, rng, 5 if name == "short.parquet" else 30)
    (directory / "notes.txt").write_text("not a trace, and not called one")
    return directory


def test_all_of_them_are_what_each_is_summed_up(fleet):
    bandwidths, downtimes = [1e6, 1e7, 1e9], [0.01, 0.5]
    found = sweep(fleet, bandwidths=bandwidths, downtimes=downtimes, intervals=[10, 3], chunk_sizes=[4096, 1 << 16])
    assert [machine.name for machine in found.machines] == ["a.parquet", "b.trace", "rack/c", "short.parquet"]
    assert found.left_out == {}
    assert [(each.bandwidth, each.downtime) for each in found.migrations] == [
        (b, d) for b in bandwidths for d in downtimes
    ]
    for each in found.migrations:
        forecasts = []
        for machine in found.machines:
            with Trace(fleet / machine.name) as trace:
                forecasts.append(what_if(trace, each.bandwidth, each.downtime))
        verdicts = [forecast.verdict for forecast in forecasts]
        assert each.converging == verdicts.count("converges")
        assert each.diverging == verdicts.count("does not converge")
        assert each.unknown == verdicts.count("unknown")
        seconds = [forecast.seconds for forecast in forecasts if forecast.verdict == "converges"]
        assert each.slowest == max(seconds, default=None)
    assert {each.converging for each in found.migrations} >= {0, 4}


def saves(path, interval):
    """Page by page: the sets of pages that saves at an interval would have seen, and how long they took."""
    pending, last, sets = set(), 0.0, []
    with Trace(path) as trace:
        for epoch in trace.epochs():
            pending |= set(epoch.pages)
            if epoch.time - last >= interval:
                sets.append(pending)
                pending, last = set(), epoch.time
    return sets, last


def chunks_by_bytes(pages, size):
    """Every 512 bytes, of which pages and chunks have whole numbers."""
    return len(
        {byte // size for page in pages for byte in (*range(page * 4096, page * 4096 + 4096, 512), page * 4096 + 4095)}
    )


@pytest.mark.parametrize("interval", [1, 3, 10])
def test_what_saving_costs_is_counted_page_by_page(fleet, interval):
    found = sweep(fleet, bandwidths=[1e9], intervals=[interval], chunk_sizes=[4096, 10_240, 1 << 16])
    every = [saves(fleet / machine.name, interval) for machine in found.machines]
    every = [(sets, seconds) for sets, seconds in every if sets]
    assert len(every) == (3 if interval == 10 else 4)
    for saving in found.savings:
        size = saving.chunk_bytes
        chunks = [[chunks_by_bytes(pages, size) for pages in sets] for sets, _ in every]
        assert saving.machines == len(every)
        per_second = sum(sum(counts) / seconds for counts, (_, seconds) in zip(chunks, every, strict=True))
        assert saving.requests_per_second == pytest.approx(per_second)
        assert saving.bytes_per_second == pytest.approx(per_second * size)
        assert saving.largest == max(max(counts) for counts in chunks) * size
        dirty = sum(len(pages) for sets, _ in every for pages in sets) * 4096
        assert saving.amplification == pytest.approx(sum(map(sum, chunks)) * size / dirty)
    assert found.savings[0].amplification == 1


def test_chunks_are_counted_once():
    runs = np.array([[0, 1], [2, 1], [3, 10], [1000, 1]], np.int64)
    assert chunks_of(runs, 4096, 1 << 16) == 2
    assert chunks_of(runs, 4096, 4096) == 13
    assert chunks_of(runs, 4096, 1024) == 52
    assert chunks_of(runs[:0], 4096, 1024) == 0


def test_a_pool_gives_the_same_answer(fleet):
    with ThreadPoolExecutor(2, "of-the-test") as pool:
        assert sweep(fleet, pool=pool) == sweep(fleet)


def test_a_cluster_gives_the_same_answer(fleet):
    class Cluster:
        """A client of Dask, as far as this goes."""

        def map(self, function, *items, pure):
            assert pure is False
            return list(map(function, *items))

        def gather(self, futures):
            return futures

    assert sweep(fleet, pool=Cluster()) == sweep(fleet)


def test_only_the_programs_own_time_is_counted(tmp_path):
    with Recorder(tmp_path / "a.parquet", NPAGES) as recorder:
        for time, count in ((2.0, 500), (3.0, 2), (4.0, 2), (5.0, 900)):
            recorder.write(time, dl.DirtyPages.from_runs([[0, count]], NPAGES))
        recorder.program = (2.0, 4.0)
    found = sweep(tmp_path, intervals=[1], chunk_sizes=[4096])
    assert (found.machines[0].seconds, found.machines[0].bytes_per_second) == (2.0, 2 * 4096)
    assert found.savings[0].requests_per_second == 2


def test_a_damaged_trace_is_left_out_and_named(fleet, tmp_path):
    whole = record(tmp_path / "whole.parquet", np.random.default_rng(1)).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-100])
    (tmp_path / "cut-of-another-name").write_bytes(whole[:-100])
    (tmp_path / "empty.trace").write_bytes(b"")
    found = sweep(tmp_path)
    assert [machine.name for machine in found.machines] == ["whole.parquet"]
    assert sorted(found.left_out) == ["cut-of-another-name", "cut.parquet", "empty.trace"]
    assert "not a Parquet file" in found.left_out["cut.parquet"]
    (tmp_path / "whole.parquet").unlink()
    with pytest.raises(dl.DirtyLogError, match=r"no trace that can be read: cut-of-another-name: "):
        sweep(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bandwidths": [0]}, "bandwidths is"),
        ({"downtimes": [-1]}, "at least 0"),
        ({"intervals": []}, "there must be one"),
        ({"intervals": [math.inf]}, "intervals is"),
        ({"chunk_sizes": [0]}, "at least 1 byte"),
    ],
)
def test_numbers_that_will_not_do_are_refused(fleet, options, said):
    with pytest.raises(ValueError, match=said):
        sweep(fleet, **options)


def test_a_place_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        sweep(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        sweep(tmp_path / "file")


def test_a_bucket_is_swept_like_a_directory(fleet, s3, monkeypatch):
    make, _ = s3
    make()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    endpoint, bucket = make.endpoint, make.bucket
    for path in fleet.rglob("*"):
        if path.is_file():
            url = f"{endpoint}/{bucket}/traces/{path.relative_to(fleet)}"
            kind = {"Content-Type": "application/octet-stream"}
            with urlopen(Request(url, path.read_bytes(), kind, method="PUT"), timeout=30):
                pass
    where = f"s3://{bucket}/traces?scheme=http&region=us-east-1&endpoint_override={endpoint.removeprefix('http://')}"
    assert sweep(where) == sweep(fleet)


def run(*words):
    parser = argparse.ArgumentParser()
    rate.add_arguments(parser)
    return rate.run(parser.parse_args([str(word) for word in words]))


def test_the_command_answers_in_json_and_people(fleet, capsys):
    words = ["--fleet", fleet, "--bandwidth", "1e7", "1e9", "--every", "10", "--chunk", "65536", "1048576"]
    assert run(*words, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["machines"]) == 4
    assert [each["bandwidth"] for each in answer["migrations"]] == [1e7, 1e9]
    assert [each["chunk_bytes"] for each in answer["savings"]] == [65536, 1 << 20]
    assert answer["left_out"] == {}
    assert run(*words) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "4 machines" in text
    assert "rack/c" in text
    assert "1.0 MiB" in text


def test_the_command_names_what_is_left_out(tmp_path, capsys):
    record(tmp_path / "a.parquet", np.random.default_rng(1))
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    assert run("--fleet", tmp_path) == 0
    assert "left out: b.parquet: " in capsys.readouterr().err


def test_a_fleet_and_a_trace_are_one_too_many(fleet):
    with pytest.raises(dl.DirtyLogError, match="one of them"):
        run(fleet / "a.parquet", "--fleet", fleet)
    with pytest.raises(dl.DirtyLogError, match="--scheduler is about a fleet"):
        run(fleet / "a.parquet", "--scheduler", "tcp://127.0.0.1:1")
