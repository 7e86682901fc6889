"""A program that writes 16 MiB in each second: every command says so, and says the same of its peak.

The program writes when it is told to, and the seconds are the test's own: how busy the machine is does not matter.
"""

import argparse
import json
from importlib import import_module

import pytest

from ..sources.test_process import PAGE, Puppet, attach

pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")

from dirtylog.commands._looks import Watcher
from dirtylog.commands.profile import report_text
from dirtylog.sinks.profile import Sampler
from dirtylog.sinks.report import report_html
from dirtylog.sinks.trace import Recorder, Trace
from dirtylog.sources.process.naming import Names

PER_SECOND = 16 << 20
SECONDS = 8
# Samples come when they can: a busy machine has long and short ones, and the last comes very soon.
MOMENTS = [0.9, 2.1, 3.0, 4.05, 4.95, 6.0, 7.1, 7.9, 8.0, 8.004]
PAGES = PER_SECOND // PAGE * 3  # the same page is written again after three seconds


@pytest.fixture(scope="module")
def steady():
    """A program, and a call that makes it write what is due by a moment; returns when it has."""
    with Puppet() as puppet:
        address = puppet.do(f"new({PAGES})")
        puppet.do(f"poke({address}, *range({PAGES}))")
        written = [0]

        def write_until(moment):
            upto = int(moment * PER_SECOND / PAGE)
            puppet.do(f"poke({address}, *(page % {PAGES} for page in range({written[0]}, {upto})))")
            written[0] = upto

        puppet.write_until, puppet.written = write_until, written
        # And not what its interpreter writes to follow the orders, which differs from one build of Python to the next.
        puppet.select = lambda area: area.start <= address < area.end
        yield puppet


@pytest.fixture(scope="module")
def sampled(steady, tmp_path_factory):
    """One sampling of it: what `profile` says, and the trace that `record` makes."""
    path = tmp_path_factory.mktemp("steady") / "trace.parquet"
    now = [0.0]
    steady.written[0] = 0
    with attach(steady.pid, select=steady.select) as process, Recorder(path, 0, PAGE) as recorder:
        process.harvest()
        sampler = Sampler(process, clock=lambda: now[0], on_sample=recorder.write)
        for now[0] in MOMENTS:
            steady.write_until(now[0])
            sampler.sample()
        recorder.regions.update(sampler.regions)
        recorder.program = sampler.program
    return sampler.profile(), path


def test_a_profile_says_what_a_steady_program_writes(sampled):
    profile, _ = sampled
    assert profile.bytes_per_second == pytest.approx(PER_SECOND, rel=0.05)
    assert profile.peak_bytes_per_second == pytest.approx(PER_SECOND, rel=0.10)
    assert profile.dirtied_bytes == pytest.approx(PER_SECOND * SECONDS, rel=0.05)
    second = next(snapshot for snapshot in profile.snapshots if snapshot.every == 1)
    assert second.mean_bytes == pytest.approx(PER_SECOND, rel=0.05)
    assert profile.mappings[0].share > 0.95
    assert "16." in report_text(profile).partition(" MiB dirtied per second")[0]


def run(name, *words):
    command = import_module(f"dirtylog.commands.{name}")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(word) for word in words])) == 0


def test_rate_says_the_same_of_its_trace(sampled, capsys):
    _, path = sampled
    run("rate", path, "--json")
    answer = json.loads(capsys.readouterr().out)
    assert answer["bytes_per_second"] == pytest.approx(PER_SECOND, rel=0.05)
    assert answer["peak_bytes_per_second"] == pytest.approx(PER_SECOND, rel=0.10)
    # The last harvest was of some milliseconds: with it, those of a second reach back by one more.
    assert answer["working_set_bytes"]["60"] == pytest.approx(PAGES * PAGE, rel=0.05)


def test_the_report_says_the_same_of_it(sampled):
    """By what its page is given; that the page says this, a browser shows in the tests of the report."""
    with Trace(sampled[1]) as trace:
        data = json.loads(report_html(trace).partition('id="data">')[2].partition("</script>")[0])
    seconds = data["edges"][-1] - data["edges"][0]
    assert sum(data["columnPages"]) * PAGE / seconds == pytest.approx(PER_SECOND, rel=0.05)
    peaks = [peak for peak in data["columnPeaks"] if peak is not None]
    assert max(peaks) * PAGE == pytest.approx(PER_SECOND, rel=0.10)


def test_top_says_the_same_look_by_look(steady):
    now = [0.0]
    steady.written[0] = 0
    with attach(steady.pid, select=steady.select) as process:
        watcher = Watcher([(process, Names(process.pid))], "01", lambda: now[0])
        rates = []
        for now[0] in MOMENTS[:-2]:
            steady.write_until(now[0])
            look = watcher.look()
            rates.append(look.bytes_per_second)
            assert max(row.bytes_per_second for row in look.rows) == pytest.approx(PER_SECOND, rel=0.05)
    assert rates == pytest.approx([PER_SECOND] * len(rates), rel=0.05)
    assert look.working_sets["60"] == pytest.approx(PAGES * PAGE, rel=0.05)


def test_a_program_that_sleeps_writes_nothing_at_any_interval(steady):
    now = [0.0]
    with attach(steady.pid) as process:
        process.harvest()
        sampler = Sampler(process, clock=lambda: now[0])
        for number in range(1, 61):
            now[0] = number * 0.05
            sampler.sample()
        profile = sampler.profile()
    assert profile.bytes_per_second < 100 << 10
    assert profile.peak_bytes_per_second < 100 << 10
