"""A trace of a few bytes that would cost minutes: its runs are held to one pass over the page space."""

import json

import numpy as np
import pytest

from dirtylog.sinks.trace import Trace, TraceError
from dirtylog.sinks.trace.layout import COLUMNS, METADATA_KEY

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


def test_a_name_from_a_file_gives_the_terminal_no_orders(tmp_path, capsys):
    from dirtylog import DirtyPages
    from dirtylog.cli import main
    from dirtylog.sinks.trace import Recorder

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
