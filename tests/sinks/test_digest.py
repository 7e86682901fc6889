"""What a digest says of a trace: by value, against sets of page numbers; with a bound on what it holds."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtylog import DirtyPages

pa = pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")

from dirtylog.sinks.rate import Peak  # noqa: E402
from dirtylog.sinks.trace import Recorder, Trace, TraceEpoch, what_if  # noqa: E402
from dirtylog.sinks.trace import digest as module  # noqa: E402
from dirtylog.sinks.trace.digest import digest, stretches  # noqa: E402
from dirtylog.sinks.trace.names import short_names, without_address  # noqa: E402
from dirtylog.sinks.trace.runs import Runs  # noqa: E402

NPAGES = 300
REGIONS = {"heap at 0x1000": (0, 100), "heap at 0x9000": (150, 50), "inner": (20, 10), "anonymous at 0x5000": (200, 60)}
# What a page belongs to: the smallest region around it; both parts of the heap are one.
OWNERS = ["inner" if 20 <= page < 30 else "heap" if page < 100 else "" for page in range(150)]
OWNERS += ["heap"] * 50 + ["anonymous at 0x5000"] * 60 + [""] * 40


@st.composite
def recordings(draw):
    """Some epochs: how long after the last, which pages, whether exact."""
    steps = st.integers(1, 40).map(lambda number: number / 16)
    pages = st.one_of(
        st.frozensets(st.integers(0, NPAGES - 1), max_size=20),
        st.tuples(st.integers(0, NPAGES - 1), st.integers(1, 120)).map(
            lambda run: frozenset(range(run[0], min(NPAGES, sum(run))))
        ),
    )
    return draw(st.lists(st.tuples(steps, pages, st.booleans()), max_size=24))


class Recorded:
    """What a trace of some epochs is to who reads it, without the file."""

    def __init__(self, epochs, npages=NPAGES, regions=REGIONS):
        self.npages, self.page_size, self.regions, self.length = npages, 4096, regions, len(epochs)
        self._epochs, time = [], 0.0
        for number, (step, pages, exact) in enumerate(epochs, 1):
            time += step
            runs = Runs(DirtyPages.from_indices(sorted(pages), npages).runs(), npages)
            self._epochs.append(TraceEpoch(number, time, runs, 4096, exact))

    def epochs(self):
        return iter(self._epochs)


@pytest.fixture
def few_columns(monkeypatch):
    monkeypatch.setattr(module, "MAX_COLUMNS", 8)
    monkeypatch.setattr(module, "MAX_BUCKETS", 16)


def columns_of(epochs, facts):
    """The epochs of each column."""
    ends = np.cumsum(facts.column_epochs).tolist()
    return [epochs[end - count : end] for end, count in zip(ends, facts.column_epochs.tolist(), strict=True)]


def check(epochs, facts):
    """Compare with what sets of page numbers say."""
    times = np.cumsum([step for step, _, _ in epochs]).tolist()
    sets = [pages for _, pages, _ in epochs]
    assert facts.epochs == len(epochs)
    assert facts.seconds == (times[-1] if times else 0)
    assert facts.inexact == sum(not exact for _, _, exact in epochs)
    assert facts.distinct == len(frozenset().union(*sets))
    columns = columns_of(epochs, facts)
    assert facts.edges.tolist() == [0, *(times[i - 1] for i in np.cumsum(facts.column_epochs).tolist())]
    assert facts.column_pages.tolist() == [sum(len(pages) for _, pages, _ in column) for column in columns]
    assert facts.column_inexact.tolist() == [sum(not exact for _, _, exact in column) for column in columns]
    # Each union of columns.
    held = [frozenset().union(*(pages for _, pages, _ in column)) for column in columns]
    for i in range(len(held) + 1):
        assert facts.unions[i].tolist() == [len(frozenset().union(*held[i:j])) for j in range(len(held) + 1)]
    # How soon, and how often.
    last, gaps = {}, Counter()
    for number, pages in enumerate(sets):
        gaps.update((number - last[page]).bit_length() if page in last else 0 for page in pages)
        last.update(dict.fromkeys(pages, number))
    assert facts.gaps.sum(axis=0).tolist() == [gaps[i] for i in range(module.GAPS)]
    often = Counter(count.bit_length() - 1 for count in Counter(page for pages in sets for page in pages).values())
    assert {i: count for i, count in enumerate(facts.often.tolist()) if count} == often
    # Whose.
    written = Counter(OWNERS[page] for pages in sets for page in pages)
    assert {facts.regions[i]: count for i, count in facts.written().items()} == written
    # The highest rate over a second.
    peak = Peak(0.0)
    for time, pages in zip(times, sets, strict=True):
        peak.add(time, len(pages))
    assert facts.peak == peak.bytes_per_second
    if np.isfinite(facts.column_peaks).any():
        assert np.nanmax(facts.column_peaks) == peak.bytes_per_second


@settings(max_examples=40)
@given(epochs=recordings())
def test_a_digest_says_what_sets_of_page_numbers_say(epochs):
    check(epochs, digest(Recorded(epochs)))


@settings(max_examples=30)
@given(epochs=recordings())
@pytest.mark.usefixtures("few_columns")
def test_so_it_does_where_epochs_share_columns(epochs):
    facts = digest(Recorded(epochs))
    assert len(facts.column_pages) <= 8
    check(epochs, facts)


@settings(max_examples=20)
@given(epochs=recordings())
@pytest.mark.parametrize("buckets", [module.MAX_BUCKETS, 16])
def test_the_map_has_every_page_that_was_written_in_its_region_and_column(buckets, epochs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_BUCKETS", buckets)
        facts = digest(Recorded(epochs))
    plan = facts.map(rows=24, regions=2)
    assert [block.start for block in plan.blocks] == [0, *(block.end for block in plan.blocks)][:-1]
    for column, cells in zip(columns_of(epochs, facts), plan.cells.T, strict=True):
        pages = [page for _, pages, _ in column for page in pages]
        assert cells.sum() == len(pages)
        for block in plan.blocks:
            if "other regions" not in block.name:
                mine = [page for page in pages if OWNERS[page] == block.name]
                assert cells[block.start : block.end].sum() == len(mine)
                for row in range(block.start, block.end):
                    within = sum(plan.first[row] <= page <= plan.last[row] for page in mine)
                    assert within >= cells[row]
    assert (np.diff(plan.edges) > 0).all()
    assert not len(plan.first) or plan.edges[-1] == pytest.approx(1)
    # A row stands for as many pages as can be written in it.
    most = max(facts.column_epochs.tolist(), default=0)
    assert (plan.cells <= plan.npages[:, None] * most).all()
    assert plan.cells.any(axis=1).all()


@given(recordings(), st.floats(1e3, 1e8), st.sampled_from([0.0, 0.001, 0.03, 1.0]), st.integers(0, 60))
def test_a_migration_out_of_a_digest_is_that_out_of_the_trace(epochs, bandwidth, downtime, start):
    trace, start = Recorded(epochs), start / 8
    assert digest(trace).what_if(bandwidth, downtime, start=start) == what_if(trace, bandwidth, downtime, start=start)


@settings(max_examples=20)
@given(recordings(), st.sampled_from([0.5, 1.0, 2.0]))
def test_a_snapshot_holds_what_was_written_since_the_last(epochs, every):
    epochs = [(0.5, pages, exact) for _, pages, exact in epochs]
    found = digest(Recorded(epochs)).snapshot(every)
    n = int(every / 0.5)
    groups = [frozenset().union(*(e[1] for e in epochs[i : i + n])) for i in range(0, len(epochs) - n + 1, n)]
    assert found == (sum(map(len, groups)) / len(groups) if groups else None)


@settings(max_examples=20)
@given(recordings())
def test_windows_hold_what_the_columns_hold(epochs):
    facts = digest(Recorded(epochs))
    edges, found = facts.windows(facts.column_pages)
    assert len(found) == len(edges) - 1
    assert found.sum() == pytest.approx(facts.column_pages.sum())
    assert np.allclose(np.diff(edges), np.diff(edges)[:1])


def test_epochs_of_one_moment_count_as_one():
    epochs = [(0.0, {1}, True), (1.0, {2}, True), (0.0, {2, 3}, False), (1.0, {1}, True)]
    facts = digest(Recorded(epochs))
    assert facts.edges.tolist() == [0, 1, 2]
    assert facts.column_pages.tolist() == [3, 1]
    assert facts.column_inexact.tolist() == [1, 0]
    assert facts.unions[0].tolist() == [0, 3, 3]
    assert facts.epochs == 4


def test_nothing_was_recorded():
    facts = digest(Recorded([], npages=0, regions={}))
    assert (facts.seconds, facts.distinct, facts.written(), facts.peak) == (0, 0, {}, 0)
    assert facts.map().blocks == []
    assert facts.snapshot(1.0) is None


def test_a_large_trace_takes_a_bounded_digest(monkeypatch):
    # One page in four stands for its neighbours here, as it would of 2**24 pages.
    monkeypatch.setattr(module, "MAX_UNITS", 1 << 10)
    monkeypatch.setattr(module, "MAX_COLUMNS", 64)
    npages, rng = 1 << 12, np.random.default_rng(3)
    epochs = []
    for first in rng.integers(0, npages - 256, 300).tolist():
        epochs.append((0.1, range(first, first + 256), True))
    facts = digest(Recorded(epochs, npages, {f"array {i}": (i, 1) for i in range(4000)}))
    assert facts.sampled
    assert len(facts.column_pages) < module.MAX_COLUMNS
    assert len(facts.stretches) <= module.MAX_STRETCHES
    assert sum(len(column.ids) for column in facts._columns) <= module.MAX_COLUMNS * module.MAX_BUCKETS
    assert facts.before.shape == (len(facts.column_pages) + 1, len(facts.column_pages))
    assert facts.column_pages.sum() == 300 * 256
    assert facts.distinct == pytest.approx(npages, rel=0.05)
    # Estimates: pages in runs of 256, looked at one in four.
    assert facts.gaps.sum() == pytest.approx(300 * 256, rel=0.02)
    assert facts.unions[0, 1] <= facts.unions[0, -1] == facts.distinct


def test_after_very_many_writes_half_as_many_pages_are_followed(monkeypatch):
    monkeypatch.setattr(module, "MAX_WORK", 2000)
    facts = digest(Recorded([(1.0, frozenset(range(NPAGES)), True)] * 30))
    assert facts.sampled
    assert facts.distinct == pytest.approx(NPAGES, rel=0.1)
    assert facts.gaps.sum() == pytest.approx(30 * NPAGES, rel=0.1)


def test_a_trace_is_read_once(tmp_path, monkeypatch):
    from dirtylog.sinks.report import report_html

    with Recorder(tmp_path / "trace", 8) as recorder:
        recorder.write(1.0, DirtyPages.from_indices([1], 8))
    with Trace(tmp_path / "trace") as trace:
        readings, read = [], trace.epochs
        monkeypatch.setattr(trace, "epochs", lambda: readings.append(1) or read())
        report_html(trace)
    assert len(readings) == 1


def test_pages_belong_to_the_smallest_region_around_them():
    found = stretches({"all": (0, 100), "part": (10, 20), "cell": (15, 1), "empty": (50, 0)}, 120)
    assert [(stretch.name, stretch.first, stretch.npages) for stretch in found] == [
        ("all", 0, 10),
        ("part", 10, 5),
        ("cell", 15, 1),
        ("part", 16, 14),
        ("all", 30, 70),
        ("", 100, 20),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("[heap] at 0x7f00", "[heap]"),
        ("libc.so.6 at 0x7f00, page 12", "libc.so.6"),
        ("anonymous at 0x7f00", "anonymous at 0x7f00"),
        ("model.weights", "model.weights"),
        ("", ""),
    ],
)
def test_parts_of_one_thing_are_one_region(name, expected):
    assert without_address(name) == expected


def test_what_was_recorded_when_and_where_is_in_the_trace(tmp_path):
    with Recorder(tmp_path / "trace", 1) as recorder:
        recorder.about["command"] = "./server --port 1"
    with Trace(tmp_path / "trace") as trace:
        assert trace.about == {"command": "./server --port 1"}


def test_what_was_at_one_place_one_after_the_other_is_counted():
    names = ["anonymous at 0x7f0000001000", "anonymous at 0x7f0000001000, page 9", "a" * 99 + "b", "a" * 99 + "b"]
    assert short_names(names, [4096] * 4) == [
        "anonymous 4 KiB …0001",
        "anonymous 4 KiB …0001 (2)",
        "a" * 19 + "…aaaaab",
        "a" * 19 + "…aaaaab (2)",
    ]


def test_names_are_short_and_apart():
    names = [
        "anonymous at 0x7f0000001000",
        "anonymous at 0x7f0000005000",
        "anonymous at 0x7f0000009000",
        "w" * 40,
        "[heap]",
    ]
    assert short_names(names, [1 << 20, 1 << 20, 64 << 20, 1, 1]) == [
        "anonymous 1 MiB …0001",
        "anonymous 1 MiB …0005",
        "anonymous 64 MiB",
        "w" * 19 + "…" + "w" * 6,
        "[heap]",
    ]
    assert short_names(names[:4], [1 << 20, 1 << 20, 64 << 20, 1], brief=True) == [
        "1 MiB …0001",
        "1 MiB …0005",
        "64 MiB",
        "w" * 10 + "…" + "w" * 6,
    ]
