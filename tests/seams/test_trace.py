"""A trace of a few bytes that would cost minutes: its runs are held to one pass over the page space."""

import json

import numpy as np
import pytest

from dirtylog import DirtyPages
from dirtylog.cli import main
from dirtylog.sinks.trace import Recorder, Trace, TraceError, runs, what_if
from dirtylog.sinks.trace.layout import COLUMNS, METADATA_KEY
from dirtylog.sinks.trace.runs import Runs

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(0, 64), (0, 64)], "overlap or do not ascend"),
        ([(0, 3), (2, 1)], "overlap or do not ascend"),
        ([(9, 1), (4, 1)], "overlap or do not ascend"),
        ([(0, 0), (0, 0)], "a run of no pages beside others"),
        ([(0, 1), (5, 0)], "a run of no pages beside others"),
    ],
)
def test_runs_that_repeat_are_refused_before_they_cost_anything(tmp_path, runs, message):
    path = tmp_path / "trace.parquet"
    schema = pa.schema([pa.field(name, pa.type_for_alias(kind), False) for name, kind in COLUMNS.items()])
    header = {"version": 1, "npages": 64, "page_size": 4096, "epochs": 1, "regions": {}}
    first, count = np.array(runs, np.int64).T
    n = len(runs)
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        columns = [np.full(n, 1.0), np.ones(n, np.int64), first, count, np.full(n, True)]
        writer.write_table(pa.table(columns, schema=schema))
        writer.add_key_value_metadata({METADATA_KEY.decode(): json.dumps(header)})
    with pytest.raises(TraceError, match=message), Trace(path) as trace:
        list(trace.epochs())


@pytest.fixture
def huge(tmp_path):
    """A few hundred bytes per thousand epochs, each of 2**32 pages: half a gigabyte as a bitmap."""
    path = tmp_path / "trace.parquet"
    schema = pa.schema([pa.field(name, pa.type_for_alias(kind), False) for name, kind in COLUMNS.items()])
    n, npages = 1000, 1 << 32
    header = {"version": 1, "npages": npages, "page_size": 4096, "epochs": n, "regions": {"all": [0, npages]}}
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        numbers = np.arange(1, n + 1)
        columns = [numbers / n, numbers, np.zeros(n, np.int64), np.full(n, npages), np.full(n, True)]
        writer.write_table(pa.table(columns, schema=schema))
        writer.add_key_value_metadata({METADATA_KEY.decode(): json.dumps(header)})
    return path


@pytest.fixture
def _no_bitmaps(monkeypatch):
    """Let nobody ask for pages: 2**32 of them take half a gigabyte per epoch, and their numbers 32."""
    monkeypatch.setattr(Runs, "pages", None)
    monkeypatch.setattr(runs, "DirtyPages", type(None))


@pytest.mark.usefixtures("_no_bitmaps")
def test_reading_a_trace_costs_what_is_in_the_file_however_large_its_page_space(huge, capsys):
    with Trace(huge) as trace:
        assert sum(epoch.nbytes for epoch in trace.epochs()) == 1000 << 44
        assert what_if(trace, 1e9, 0.1).verdict == "unknown"
    assert main(["rate", str(huge), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["bytes"] == answer["regions_bytes"]["all"] == 1000 << 44
    assert answer["working_set_bytes"]["10"] == 1 << 44


@pytest.mark.usefixtures("_no_bitmaps")
def test_drawing_a_trace_costs_what_is_in_the_file_however_large_its_page_space(huge):
    assert main(["report", str(huge)]) == 0


@pytest.mark.parametrize("npages", [130, 100_000])
def test_runs_unite_and_count_as_pages_do(npages):
    generator = np.random.default_rng(npages)
    among = {"none": (5, 0), "low": (0, npages // 3), "high": (npages // 2, npages - npages // 2)}
    together, pages = Runs.nothing(npages), DirtyPages.from_indices([], npages)
    for _ in range(40):
        first, count = generator.integers(0, npages - 60, 20), generator.integers(1, 60, 20)
        some = DirtyPages.from_runs(np.stack([first, count], axis=1), npages)
        together, pages = together | Runs(some.runs(), npages), pages | some
        assert together.pages(4096, exact=True) == pages
        assert together.count == pages.count
        assert together.runs().tolist() == pages.runs().tolist()
        numbers = pages.indices()
        expected = {name: int(((numbers >= a) & (numbers < a + n)).sum()) for name, (a, n) in among.items()}
        assert together.count_ranges(among) == expected


def test_a_name_from_a_file_gives_the_terminal_no_orders(tmp_path, capsys):
    path = tmp_path / "trace\x1b]0;title\x07.parquet"
    with Recorder(path, 64) as recorder:
        for at in (1, 2):
            recorder.write(at, DirtyPages.from_indices([at], 64))
        recorder.regions["heap\x1b[31m"] = (0, 64)
    assert main(["rate", str(path)]) == 0
    assert main(["rate", str(tmp_path / "\x1b]0;x\x07none")]) == 1
    printed = capsys.readouterr()
    assert "heap?[31m" in printed.out
    assert "\x1b" not in printed.out + printed.err
