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
