"""Traces: what is recorded comes back, whatever is damaged is refused, and migrations are reckoned from it."""

import errno
import json
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dirtylog as dl
from dirtylog.sinks.rate import RateMeter
from dirtylog.sinks.trace import Recorder, Trace, TraceError, layout, record, replay, what_if
from dirtylog.sinks.trace.parquet_pages import unpacked_sizes

pa = pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow (extra: trace) is not installed")

NPAGES = 1000


def pages(numbers, npages=NPAGES, **kwargs):
    return dl.DirtyPages.from_indices(numbers, npages, **kwargs)


def write(path, epochs, npages=NPAGES):
    with Recorder(path, npages) as recorder:
        for time, numbers in epochs:
            recorder.write(time, pages(numbers, npages))
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.parquet"


# ---- recording and reading back ----------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, NPAGES - 1), max_size=50), st.booleans()), max_size=12)
)
def test_what_is_recorded_comes_back(tmp_path_factory, epochs):
    path = tmp_path_factory.mktemp("trace") / "trace.parquet"
    time, expected = 0.0, []
    with Recorder(path, NPAGES, 4096) as recorder:
        for step, numbers, exact in epochs:
            time += step / 4
            expected.append((len(expected) + 1, time, pages(sorted(numbers), exact=exact), exact))
            assert recorder.write(time, expected[-1][2]) == len(expected)
    with Trace(path) as trace:
        assert (trace.npages, trace.page_size, trace.length) == (NPAGES, 4096, len(expected))
        assert [(e.number, e.time, e.pages, e.pages.exact) for e in trace.epochs()] == expected


def test_epochs_larger_than_a_batch_come_back_whole(path, monkeypatch):
    monkeypatch.setattr(layout, "ROWS_AT_ONCE", 64)
    epochs = [(float(i), range(0, NPAGES, 2 + i)) for i in range(6)]
    write(path, epochs)
    with Trace(path) as trace:
        assert [(e.time, e.pages) for e in trace.epochs()] == [(time, pages(n)) for time, n in epochs]


def test_a_source_is_recorded_at_its_rhythm(path):
    source, now, waits = dl.DirtyBitmap(NPAGES), [5.0], []

    def wait(seconds):
        waits.append(seconds)
        now[0] += seconds + 0.1  # late each time, and the delays do not add up
        source.mark(len(waits))

    assert record(path, source, interval=1.0, epochs=3, clock=lambda: now[0], wait=wait) == 3
    assert waits == pytest.approx([1.0, 0.9, 0.9])
    with Trace(path) as trace:
        assert [(round(e.time, 6), list(e.pages)) for e in trace.epochs()] == [(1.1, [1]), (2.1, [2]), (3.1, [3])]


def test_a_recording_that_is_stopped_harvests_once_more(path):
    source, stop = dl.DirtyBitmap(NPAGES), threading.Event()
    source.mark(7)
    stop.set()
    assert record(path, source, stop=stop) == 1
    with Trace(path) as trace:
        assert list(trace.harvest()) == [7]


def test_a_recording_needs_an_end_and_an_interval(path):
    with pytest.raises(ValueError, match="nothing would end"):
        record(path, dl.DirtyBitmap(1))
    with pytest.raises(ValueError, match="interval is 0"):
        record(path, dl.DirtyBitmap(1), interval=0, epochs=1)


def test_a_recording_that_fails_leaves_the_file_that_was_there(path):
    write(path, [(1.0, [1])])
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), Recorder(path, NPAGES) as recorder:  # noqa: PT012
        recorder.write(1.0, pages([2]))
        raise ZeroDivisionError
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_recorder_refuses_what_would_not_read_back(path):
    with Recorder(path, NPAGES) as recorder:
        recorder.write(2.0, pages([1]))
        for time in (1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="time is"):
                recorder.write(time, pages([1]))
        with pytest.raises(ValueError, match="of 8192 bytes"):
            recorder.write(3.0, pages([1], page_size=8192))
    with pytest.raises(ValueError, match="closed"):
        recorder.write(3.0, pages([1]))
    with pytest.raises(ValueError, match="a trace holds up to"):
        Recorder(path, layout.MAX_TRACE_PAGES + 1)
    with Trace(path) as trace:
        assert trace.length == 1


def test_a_page_space_that_grows_is_recorded_at_its_largest(path):
    with Recorder(path, 10) as recorder:
        recorder.write(1.0, pages([9], 10))
        recorder.write(2.0, pages([99], 100))
        recorder.regions["heap"] = (10, 90)
    with Trace(path) as trace:
        assert (trace.npages, trace.regions) == (100, {"heap": (10, 90)})
        assert [list(e.pages) for e in trace.epochs()] == [[9], [99]]


# ---- a trace as a source -----------------------------------------------------------------------

EPOCHS = [(0.5, [1, 2]), (1.0, []), (1.5, [2, 3]), (2.5, [999])]


def test_each_harvest_is_the_next_epoch(path):
    with Trace(write(path, EPOCHS)) as trace:
        for number, (time, numbers) in enumerate(EPOCHS, 1):
            assert not trace.done
            assert list(trace.peek()) == numbers
            assert list(trace.harvest()) == numbers
            assert (trace.time, trace.number) == (time, number)
        assert trace.done
        assert not trace.peek()
        assert not trace.harvest()
        trace.rewind()
        assert list(trace.harvest()) == [1, 2]


def test_a_harvest_can_reach_up_to_a_moment(path):
    with Trace(write(path, EPOCHS)) as trace:
        assert list(trace.harvest(until=0.4)) == []
        assert list(trace.harvest(until=1.5)) == [1, 2, 3]
        assert trace.time == 1.5
        assert list(trace.harvest(until=9)) == [999]


def test_a_trace_is_replayed_into_any_sink(path):
    seen = []
    with Trace(write(path, EPOCHS)) as trace:
        assert replay(trace, lambda epoch: seen.append((epoch.number, list(epoch.pages)))) == 4
    assert seen == [(i, numbers) for i, (_, numbers) in enumerate(EPOCHS, 1)]


def test_a_trace_can_be_metered(path):
    with Trace(write(path, [(0.0, []), *EPOCHS])) as trace:
        log = dl.DirtyLog()
        log.attach(trace)
        meter = RateMeter(log, clock=lambda: trace.time)
        rates = []
        while not trace.done:
            rates.append(meter.sample().pages_per_second)
        assert rates == [4.0, 0.0, 4.0, 1.0]
        assert meter.working_set(2.5) == 4


def test_a_closed_trace_refuses(path):
    trace = Trace(write(path, EPOCHS))
    trace.close()
    trace.close()
    assert trace.closed
    with pytest.raises(ValueError, match="is closed"):
        list(trace.epochs())


def test_of_more_regions_than_a_trace_has_room_for_the_largest_are_named(path, monkeypatch):
    monkeypatch.setattr(layout, "MAX_METADATA_BYTES", 2000)
    sizes = [1 + 7 * i % 97 for i in range(200)]
    with Recorder(path, NPAGES) as recorder:
        recorder.write(1.0, pages([1, 2, 3]))
        recorder.regions.update({f"region {i}": (5, size) for i, size in enumerate(sizes)})
        recorder.about["missed"] = "a child; " * 10_000
        monkeypatch.setattr("dirtylog.sinks.trace.recorder.LONGEST", 100)
    with Trace(path) as trace:
        assert 20 < len(trace.regions) < 100
        assert all(trace.regions[f"region {i}"] == (5, size) for i, size in enumerate(sizes) if size > 90)
        assert trace.about["missed"] == ("a child; " * 100)[:100] + " ..."
        assert trace.length == 1


def test_a_recorder_on_a_full_disk_leaves_nothing(path):
    class Full:
        """A writer that cannot even end."""

        def __init__(self, writer):
            self.writer = writer

        def write_table(self, *_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            self.writer.close()
            raise OSError(errno.ENOSPC, "No space left on device")

    recorder = Recorder(path, NPAGES)
    recorder._writer = Full(recorder._writer)
    recorder.write(1.0, pages([1]))
    with pytest.raises(OSError, match="No space"):
        recorder.close()
    assert list(path.parent.iterdir()) == []
    # What made a block fail is not hidden by what the disk says to that.
    recorder = Recorder(path, NPAGES)
    recorder._writer = Full(recorder._writer)
    with pytest.raises(ZeroDivisionError), recorder:
        _ = 1 / 0
    assert list(path.parent.iterdir()) == []


# ---- files from elsewhere ----------------------------------------------------------------------

GOOD_HEADER = {"version": 1, "npages": NPAGES, "page_size": 4096, "epochs": 2, "regions": {}}
GOOD_ROWS = {
    "time": [1.0, 1.0, 2.0],
    "epoch": [1, 1, 2],
    "first": [0, 10, 999],
    "count": [5, 1, 1],
    "exact": [True, True, True],
}


def forge(path, header=None, rows=None, raw=None, **changes):
    schema = pa.schema([pa.field(n, pa.type_for_alias(kind)) for n, kind in layout.COLUMNS.items()])
    table = pa.table({**GOOD_ROWS, **(rows or {})}, schema=schema)
    header = json.dumps({**GOOD_HEADER, **changes} if header is None else header).encode() if raw is None else raw
    pq.write_table(table.replace_schema_metadata({"dirtylog": header}), path)
    return path


def test_the_forged_trace_is_good_where_nothing_is_changed(path):
    with Trace(forge(path)) as trace:
        assert [e.pages.indices().tolist() for e in trace.epochs()] == [[0, 1, 2, 3, 4, 10], [999]]


@pytest.mark.parametrize(
    ("message", "how"),
    [
        ("of version 2", {"version": 2}),
        ("not whole numbers", {"npages": 10.5}),
        ("not whole numbers", {"npages": True}),
        ("npages", {"npages": -1}),
        ("a trace has up to", {"npages": 1 << 40}),
        ("page_size", {"page_size": 3000}),
        ("claims 9 epochs", {"epochs": 9}),
        ("claims 1 epochs and has 2", {"epochs": 1}),
        ("region 'x'", {"regions": {"x": [900, 101]}}),
        ("region 'x'", {"regions": {"x": [-1, 1]}}),
        ("header cannot be read", {"regions": {"x": 5}}),
        ("header cannot be read", {"regions": [1]}),
        ("header cannot be read", {"header": [1, 2]}),
        ("header cannot be read", {"program": [1.0]}),
        ("program ran from 2", {"program": [2.0, 1.0]}),
        ("program ran from nan", {"program": [float("nan"), 1.0]}),
        ("header cannot be read", {"program": [0, 10**400]}),
        ("header cannot be read", {"raw": b"{"}),
        ("header cannot be read", {"raw": b"[" * 100_000}),
        ("not marked as a trace", {"raw": b""}),
        ("reaches out of its 1000 pages", {"rows": {"first": [0, 1000, 999]}}),
        ("reaches out of its 1000 pages", {"rows": {"first": [0, -1, 999]}}),
        ("reaches out of its 1000 pages", {"rows": {"count": [1, -1, 1]}}),
        ("reaches out of its 1000 pages", {"rows": {"count": [1, (1 << 63) - 1, 1]}}),
        ("not a number of seconds", {"rows": {"time": [np.nan, np.nan, 2.0]}}),
        ("not a number of seconds", {"rows": {"time": [-1.0, -1.0, 2.0]}}),
        ("comes after epoch", {"rows": {"time": [3.0, 3.0, 2.0]}}),
        ("comes after epoch", {"rows": {"epoch": [1, 1, 3]}}),
        ("comes after epoch", {"rows": {"epoch": [2, 2, 1]}}),
        ("comes after epoch", {"rows": {"epoch": [-(1 << 63), 1, 2]}}),
        ("are not of one time", {"rows": {"time": [1.0, 1.5, 2.0]}}),
        ("are not of one time", {"rows": {"exact": [True, False, True]}}),
        ("rows of epoch 0", {"rows": {"epoch": [0, 1, 2]}}),
        ("empty cells", {"rows": {"first": [0, None, 999]}}),
    ],
)
def test_a_trace_that_is_not_right_is_refused(path, message, how):
    with pytest.raises(TraceError, match=message), Trace(forge(path, **how)) as trace:
        list(trace.epochs())


def test_a_file_that_is_no_trace_is_refused(path):
    for content in (b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"hello" * 1000):
        path.write_bytes(content)
        with pytest.raises(TraceError, match="not a Parquet file"):
            Trace(path)
    pq.write_table(pa.table({"time": [1.0]}), path)
    with pytest.raises(TraceError, match="its columns are"):
        Trace(path)
    with pytest.raises(FileNotFoundError):
        Trace(path.with_name("absent"))


def test_a_row_group_that_would_fill_memory_is_refused(path, monkeypatch):
    write(path, [(1.0, range(0, 200, 2))])
    monkeypatch.setattr(layout, "ROWS_AT_ONCE", 50)
    with pytest.raises(TraceError, match="row group 0 claims 100 rows"):
        Trace(path)


def test_a_page_that_unpacks_to_more_than_the_footer_says_is_refused_before_it_is_unpacked(path):
    """The footer is made to speak of 1000 rows; the pages still unpack to 4 Mi rows, 132 MiB."""
    rows = 1 << 22
    names = list(layout.COLUMNS)
    schema = pa.schema([pa.field(name, pa.type_for_alias(kind), False) for name, kind in layout.COLUMNS.items()])
    columns = [np.zeros(rows), np.ones(rows, np.int64), *[np.zeros(rows, np.int64)] * 2, np.ones(rows, bool)]
    header = {"version": 1, "npages": NPAGES, "page_size": 4096, "epochs": 1, "regions": {}}
    whole = {"data_page_size": 1 << 30, "max_rows_per_page": rows, "write_batch_size": rows, "use_dictionary": False}
    with pq.ParquetWriter(path, schema, compression="zstd", **whole) as writer:
        writer.add_key_value_metadata({"dirtylog": json.dumps(header)})
        writer.write_table(pa.table(dict(zip(names, columns, strict=True)), schema=schema), row_group_size=rows)
    content = path.read_bytes()
    group = pq.read_metadata(path).row_group(0)
    sizes = {rows, group.total_byte_size, *(group.column(i).total_uncompressed_size for i in range(5))}
    at = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[at:-8]
    for size in sizes:
        # Numbers of the same length: a varint may begin with idle digits.
        length = -(-(2 * size).bit_length() // 7)
        footer = footer.replace(varint(2 * size, length), varint(2 * (1000 if size == rows else 30_000), length))
    path.write_bytes(content[:at] + footer + content[-8:])
    assert pq.read_metadata(path).num_rows == 1000
    with pytest.raises(TraceError, match="unpack to more than"):
        Trace(path)


def test_a_page_header_that_is_nested_without_end_is_refused(path):
    path.write_bytes(b"\x19" * 60_000)  # a list of one list of one list ...
    with path.open("rb") as file, pytest.raises(ValueError, match="nested deeper"):
        list(unpacked_sizes(file.fileno(), 0, 60_000))


def varint(value, length):
    return bytes((value >> 7 * i & 0x7F) | (0x80 if i < length - 1 else 0) for i in range(length))


def test_a_flipped_bit_is_noticed_or_harmless(path):
    """No damage makes another answer: it is refused, or nothing that counts has changed."""
    write(path, [(float(i), range(i, NPAGES, 7 + i)) for i in range(20)])
    content = path.read_bytes()
    with Trace(path) as trace:
        expected = [(e.time, e.pages) for e in trace.epochs()]
    random = np.random.default_rng(1)
    data_end = len(content) - int.from_bytes(content[-8:-4], "little") - 8
    refused = 0
    for at in random.integers(4, data_end, 150):
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            with Trace(path) as trace:
                assert [(e.time, e.pages) for e in trace.epochs()] == expected
        except TraceError:
            refused += 1
    assert refused > 100


# ---- what a migration would have done ----------------------------------------------------------


def test_a_migration_that_fits_converges(path):
    """100 new pages a second in a trace of 1000: at 1000 a second the rounds are 1, 0.1 and 0.01 s."""
    write(path, [(i / 10, range(10 * i, 10 * i + 10)) for i in range(1, 40)])
    with Trace(path) as trace:
        answer = what_if(trace, bandwidth=1000 * 4096, downtime=0.02)
        assert answer.verdict == "converges"
        assert [(r.pages, r.dirtied) for r in answer.rounds] == [(1000, 100), (100, 10)]
        # The source was not touched.
        assert trace.number == 0


def test_a_page_that_is_written_often_in_a_round_is_sent_once(path):
    write(path, [(i / 10, [1, 2]) for i in range(1, 40)])
    with Trace(path) as trace:
        answer = what_if(trace, bandwidth=1000 * 4096, downtime=0.002)
        assert [(r.pages, r.dirtied) for r in answer.rounds] == [(1000, 2)]
        assert answer.verdict == "converges"


def test_a_migration_that_never_fits_does_not_converge(path):
    write(path, [(i / 10, range(NPAGES)) for i in range(1, 100)])
    with Trace(path) as trace:
        answer = what_if(trace, bandwidth=10_000 * 4096, downtime=0.02, max_rounds=5)
        assert (answer.verdict, len(answer.rounds)) == ("does not converge", 5)


def test_a_trace_that_is_too_short_says_so(path):
    write(path, [(0.1, range(NPAGES)), (0.5, [1])])
    with Trace(path) as trace:
        assert what_if(trace, bandwidth=1000 * 4096, downtime=0.02).verdict == "unknown"
        assert what_if(trace, bandwidth=1e9, downtime=0.001, start=1.0).verdict == "unknown"


def test_a_migration_can_begin_later(path):
    write(path, [(1.0, range(NPAGES)), (2.0, []), (3.0, [5]), (4.0, []), (5.0, [])])
    with Trace(path) as trace:
        answer = what_if(trace, bandwidth=1000 * 4096, downtime=0.0, start=1.0)
        assert [(r.pages, r.dirtied) for r in answer.rounds] == [(1000, 0)]
        answer = what_if(trace, bandwidth=500 * 4096, downtime=0.0, start=1.0)
        assert [(r.pages, r.dirtied) for r in answer.rounds] == [(1000, 1), (1, 0)]
