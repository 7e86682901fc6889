"""The rate meter: rates by a clock of the test's own, working sets, and whether pre-copy would converge."""

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sinks.forecast import forecast
from dirtylog.sinks.rate import RateMeter


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def guest():
    return dl.DirtyBitmap(1000)


@pytest.fixture
def log(guest):
    log = dl.DirtyLog()
    log.attach(guest, name="guest")
    return log


@pytest.fixture
def meter(log, clock):
    return RateMeter(log, window=10.0, regions={"low": (0, 10), "high": (990, 10), "none": (5, 0)}, clock=clock)


def step(meter, clock, guest, pages, seconds=1.0):
    guest.mark_pages(pages)
    clock.now += seconds
    return meter.sample()


def test_a_rate_is_pages_by_time(meter, clock, guest):
    rate = step(meter, clock, guest, range(100), seconds=0.5)
    assert (rate.seconds, rate.pages, rate.nbytes) == (0.5, 100, 409600)
    assert (rate.pages_per_second, rate.bytes_per_second) == (200.0, 819200.0)
    assert rate.exact
    assert step(meter, clock, guest, []).pages == 0


def test_what_was_dirty_before_the_meter_is_not_its_rate(log, clock, guest):
    backup = log.observer("backup")
    guest.mark(5)
    meter = RateMeter(log, clock=clock)
    assert step(meter, clock, guest, [6]).pages == 1
    with backup.collect() as epoch:
        assert list(epoch.pages) == [5, 6]


def test_the_meter_takes_no_bits_from_others(meter, log, clock, guest):
    backup = log.observer("backup")
    for page in range(20):
        step(meter, clock, guest, [page])
    with backup.collect() as epoch:
        assert list(epoch.pages) == list(range(20))


def test_others_take_no_bits_from_the_meter(meter, log, clock, guest):
    guest.mark(3)
    with log.observer("backup").collect():
        pass
    assert step(meter, clock, guest, [4]).pages == 2


def test_sources_and_regions_are_counted_apart(meter, log, clock, guest):
    device = dl.DirtyBitmap(100)
    log.attach(device, first_page=950, name="device")
    device.mark(99)
    rate = step(meter, clock, guest, [0, 9, 10, 949, 950, 989, 990])
    assert rate.by_region == {"low": 2, "high": 1, "none": 0}
    assert rate.by_source == {"guest": 7, "device": 4}
    assert rate.pages == 8


def test_an_inexact_rate_says_so(meter, log, clock, guest):
    class Lost:
        npages, page_size = 10, 4096

        def harvest(self):
            return dl.DirtyPages._all(10)

    log.attach(Lost())
    assert not step(meter, clock, guest, []).exact


def test_a_sample_takes_time(meter, clock, guest):
    guest.mark(3)
    with pytest.raises(ValueError, match=r"0\.0 s have passed"):
        meter.sample()
    assert step(meter, clock, guest, []).pages == 1


def test_the_working_set_is_what_different_pages_were_written(meter, clock, guest):
    for i in range(5):
        step(meter, clock, guest, [i, i + 1, 500])
    assert meter.curve() == [(1.0, 3), (2.0, 4), (3.0, 5), (4.0, 6), (5.0, 7)]
    assert [meter.working_set(seconds) for seconds in (0.1, 1.0, 1.5, 3.0, 9.0)] == [3, 3, 4, 5, 7]
    with pytest.raises(ValueError, match=r"up to 10\.0"):
        meter.working_set(11.0)


def test_the_window_moves(meter, clock, guest):
    step(meter, clock, guest, range(100))
    for _ in range(10):
        step(meter, clock, guest, [1])
    assert meter.working_set(10.0) == 1
    assert len(meter.curve()) == 10


def test_the_working_set_follows_a_page_space_that_grows(meter, log, clock, guest):
    step(meter, clock, guest, [1])
    log.attach(dl.DirtyBitmap(5000), first_page=1000)
    step(meter, clock, guest, [2])
    assert meter.working_set(10.0) == 2


def test_a_meter_refuses_what_it_cannot_measure(log):
    with pytest.raises(ValueError, match="window is 0"):
        RateMeter(log, window=0)
    with pytest.raises(IndexError, match="region 'x'"):
        RateMeter(log, regions={"x": (-1, 5)})
    assert log.observers == ()


def test_a_closed_meter_leaves_the_log(log, clock):
    with RateMeter(log, clock=clock) as meter:
        assert len(log.observers) == 1
    assert log.observers == ()
    assert meter.curve() == []


def test_pre_copy_converges_where_the_link_is_faster_than_the_writer(meter, clock, guest):
    """1000 pages; 100 new ones a second: at 1000 pages a second the rounds are 1, 0.1, 0.01 s."""
    for i in range(5):
        step(meter, clock, guest, range(100 * i, 100 * i + 100))
    answer = meter.forecast(bandwidth=1000 * 4096, downtime=0.02)
    assert answer.verdict == "converges"
    assert [(r.number, r.pages, r.dirtied) for r in answer.rounds] == [(1, 1000, 100), (2, 100, 10)]
    assert answer.downtime == pytest.approx(0.01)
    assert answer.seconds == pytest.approx(1.11)


def test_pre_copy_does_not_converge_where_the_writer_is_faster(meter, clock, guest):
    for _ in range(5):
        step(meter, clock, guest, range(1000), seconds=0.1)
    answer = meter.forecast(bandwidth=1000 * 4096, downtime=0.02)
    assert answer.verdict == "does not converge"
    assert "after 30 rounds 1000 pages are left" in answer.reason
    assert len(answer.rounds) == 30


def test_a_small_working_set_converges_however_often_it_is_written(meter, clock, guest):
    for _ in range(20):
        step(meter, clock, guest, range(10), seconds=0.001)
    assert meter.forecast(bandwidth=1000 * 4096, downtime=0.011).verdict == "converges"
    assert meter.forecast(bandwidth=1000 * 4096, downtime=0.009).verdict == "does not converge"


def test_nothing_measured_is_unknown(meter):
    assert meter.forecast(bandwidth=1e6, downtime=0.01).verdict == "unknown"
    assert meter.forecast(bandwidth=1e6, downtime=1e6).verdict == "converges"


def test_a_forecast_refuses_nonsense():
    for bad in (
        {"bandwidth": 0.0},
        {"bandwidth": np.inf},
        {"bandwidth": np.nan},
        {"downtime": -1.0},
        {"max_rounds": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            forecast(10, 4096, lambda *_: 0.0, **{"bandwidth": 1.0, "downtime": 1.0, **bad})
