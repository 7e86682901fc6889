"""Pictures: what is drawn is what the trace says, on the Axes that were given."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dirtylog as dl
from dirtylog._bits.strip import density, strip_html, strip_svg
from dirtylog.sinks.forecast import Forecast, Round

# ---- the strip: no dependency ----------------------------------------------------------------------


pages_of = st.integers(1, 600).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1))))


@given(pages_of, st.integers(1, 700))
def test_density_is_the_share_of_dirty_pages(case, buckets):
    npages, numbers = case
    dirty = np.isin(np.arange(npages), list(numbers))
    edges = [i * npages // min(buckets, npages) for i in range(min(buckets, npages) + 1)]
    expected = [dirty[first:end].mean() for first, end in pairwise(edges)]
    found = density(dl.DirtyPages.from_indices(sorted(numbers), npages), buckets)
    assert found.tolist() == pytest.approx(expected)


def test_density_of_nothing_and_of_no_pages():
    assert density(dl.DirtyPages._empty(10), 4).tolist() == [0, 0, 0, 0]
    assert density(dl.DirtyPages._empty(0), 4).tolist() == []
    with pytest.raises(ValueError, match="buckets is 0"):
        density(dl.DirtyPages._empty(10), 0)


def test_the_strip_has_a_column_for_each_dirty_part():
    svg = strip_svg(dl.DirtyPages.from_runs([[0, 10], [995, 1]], 1000), buckets=100)
    assert svg.count("<rect") == 1 + 2
    assert 'x="0" width="1" height="1" fill="#c2410c" fill-opacity="1.000"' in svg
    assert 'x="99" width="1" height="1" fill="#c2410c" fill-opacity="0.280"' in svg
    assert "<title>11 of 1000 pages are dirty</title>" in svg


def test_one_page_of_very_many_can_be_seen():
    svg = strip_svg(dl.DirtyPages.from_indices([1 << 29], 1 << 30))
    assert 'x="128"' in svg
    assert 'fill-opacity="0.200"' in svg


def test_the_strip_says_how_many_and_whether_that_is_exact():
    assert "3 of 12 pages of 4096 bytes are dirty (25 %)</div>" in strip_html(dl.DirtyPages.from_indices([1, 2, 5], 12))
    assert "inexact" in strip_html(dl.DirtyPages._all(12))
    assert "0 of 0 pages" in strip_html(dl.DirtyPages._empty(0))


# ---- charts ----------------------------------------------------------------------------------------


@pytest.fixture
def ax():
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib (extra: plot) is not installed")
    return figure.Figure().add_subplot()


@pytest.fixture
def trace(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")
    from dirtylog.sinks.trace import Recorder, Trace

    path = tmp_path / "trace.parquet"
    with Recorder(path, 1024) as recorder:
        for time, runs in ((1.0, [[0, 512]]), (1.5, [[1020, 4]]), (1.5, [[0, 4]]), (3.0, [])):
            recorder.write(time, dl.DirtyPages.from_runs(runs, 1024))
    with Trace(path) as trace:
        yield trace


def test_the_heat_map_shows_which_pages_were_written_when(ax, trace):
    from dirtylog.sinks import plot

    assert plot.heat_map(trace, ax, rows=3) is ax
    mesh = ax.collections[0]
    # Three parts of the 516 pages that were written; from page 512 to page 1019 none ever was.
    assert np.ma.filled(mesh.get_array(), 0).reshape(3, 3).tolist() == [
        [1, 4 / 172, 0],
        [1, 0, 0],
        [168 / 172, 4 / 172, 0],
    ]
    coordinates = mesh.get_coordinates()
    assert coordinates[0, :, 0].tolist() == [0, 1, 1.5, 3]
    assert ax.get_ylabel() == "page"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "172", "344", "1,023"]


def test_bands_of_the_heat_map_are_regions_by_name(ax, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")
    from dirtylog.sinks import plot
    from dirtylog.sinks.trace import Recorder, Trace

    with Recorder(tmp_path / "named", 1024) as recorder:
        recorder.write(1.0, dl.DirtyPages.from_runs([[0, 4], [600, 100]], 1024))
        recorder.regions.update({"heap at 0x1000": (0, 256), "unused": (256, 256), "model.weights": (512, 512)})
    with Trace(tmp_path / "named") as trace:
        plot.heat_map(trace, ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["heap", "model.weights"]
    # The small one can be seen, and its name fits.
    low, high = ax.get_yticks()
    assert high - low > 0.4


def test_the_scale_of_the_heat_map_is_the_reports_unless_another_is_asked_for(ax, trace):
    from dirtylog.sinks import plot

    plot.heat_map(trace, ax)
    norm = ax.collections[0].norm
    assert (norm.vmin, norm.vmax) == (0.001, 1)
    other = ax.figure.add_subplot()
    plot.heat_map(trace, other, vmin=0.0, vmax=0.5, cmap="magma")
    assert (other.collections[0].norm.vmin, other.collections[0].norm.vmax) == (0, 0.5)
    with pytest.raises(ValueError, match="rows is 0"):
        plot.heat_map(trace, ax, rows=0)


def test_the_dirty_rate_is_bytes_by_time_over_windows_of_one_length(ax, trace):
    from dirtylog.sinks import plot

    assert plot.dirty_rate(trace, ax) is ax
    values, edges, _ = ax.patches[0].get_data()
    assert edges.tolist() == [0, 1, 2, 3]
    # Eight pages in the half second after the first one, and none after that.
    assert values.tolist() == [2.0, 8 * 4096 / 2**20, 0]


def test_a_migration_has_a_bar_for_each_round_and_the_pause(ax):
    from dirtylog.sinks import plot

    rounds = (Round(1, 256, 2**20, 1.0, 128), Round(2, 128, 2**19, 0.5, 64))
    forecast = Forecast("converges", "", rounds, downtime=0.25, seconds=1.75, bandwidth=2**20)
    assert plot.migration(forecast, ax) is ax
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in ax.patches]
    assert bars == [(0.0, 1.0, 1.0), (1.0, 0.5, 0.5), (1.5, 0.25, 0.25)]
    assert "converges" in ax.get_title()


def test_without_axes_the_current_ones_are_used(trace):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib (extra: plot) is not installed")
    matplotlib.use("agg")
    from matplotlib import pyplot

    from dirtylog.sinks import plot

    try:
        assert plot.dirty_rate(trace) is pyplot.gca()
    finally:
        pyplot.close("all")


def test_a_trace_of_nothing_draws_empty_axes(ax, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")
    from dirtylog.sinks import plot
    from dirtylog.sinks.trace import Recorder, Trace

    with Recorder(tmp_path / "empty", 0):
        pass
    with Trace(tmp_path / "empty") as trace:
        assert not plot.heat_map(trace, ax).collections
        assert not plot.dirty_rate(trace, ax).patches
