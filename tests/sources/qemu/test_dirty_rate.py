"""QEMU's own dirty rate: what it answers, and what it may not be asked."""

import json

import pytest

from dirtylog import cli
from dirtylog.errors import BackendUnavailable, DirtyLogError
from dirtylog.sources.qemu import DirtyRate, Qmp
from dirtylog.sources.qemu import dirty_rate as module

from ...qemu import emulated


class Answers:
    """A monitor that answers from a list, and notes what it was asked."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def execute(self, command, arguments=None):
        self.asked.append((command, arguments))
        return self.answers.pop(0)


@pytest.fixture
def instant(monkeypatch):
    """A clock that goes on by sleeping alone."""
    now = [0.0]

    class Clock:
        @staticmethod
        def monotonic():
            return now[0]

        @staticmethod
        def sleep(seconds):
            now[0] += seconds

    monkeypatch.setattr(module, "time", Clock)
    return now


def test_a_guest_under_tcg_is_sampled_and_never_asked_for_its_bitmap(tmp_path, capsys):
    with emulated(tmp_path / "q", "-S"):
        with Qmp(tmp_path / "q") as qmp:
            for mode in ("dirty-bitmap", "dirty-ring"):
                with pytest.raises(BackendUnavailable, match="does not run under KVM; use page-sampling"):
                    DirtyRate(qmp, mode)
        assert cli.main(["rate", "--qmp", str(tmp_path / "q"), "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["bytes_per_second"], answer["migrations"][0]["verdict"]) == (0, "converges")
        assert cli.main(["rate", "--qmp", str(tmp_path / "q"), "--seconds", "61"]) == 1
        assert "QEMU measures 1 to 60" in capsys.readouterr().err
        assert cli.main(["rate", "--qmp", "x", "--pid", "1"]) == 2


def test_the_rates_of_vcpus_are_told_apart_and_summed(instant):
    vcpus = [{"id": 0, "dirty-rate": 5}, {"id": 1, "dirty-rate": 2}]
    qmp = Answers(
        {"enabled": True, "present": True}, {}, {"status": "measuring"},
        {"status": "measured", "dirty-rate": 0, "mode": "dirty-ring", "vcpu-dirty-rate": vcpus},
    )  # fmt: skip
    rate = DirtyRate(qmp, "dirty-ring").measure(3)
    assert rate.vcpus == {0: 5 << 20, 1: 2 << 20}
    assert rate.bytes_per_second == 7 << 20
    assert "an upper bound" in rate.meaning
    assert qmp.asked[1] == ("calc-dirty-rate", {"calc-time": 3, "mode": "dirty-ring"})
    assert instant[0] >= 3


def test_the_bitmap_is_measured_under_kvm(instant):
    qmp = Answers({"enabled": True}, {}, {"status": "measured", "dirty-rate": 9})
    assert DirtyRate(qmp, "dirty-bitmap").measure().bytes_per_second == 9 << 20


def test_a_measurement_that_does_not_end_is_given_up(instant):
    qmp = Answers({}, *[{"status": "measuring"}] * 5000)
    with pytest.raises(DirtyLogError, match="a minute after the 2 s"):
        DirtyRate(qmp, sample_pages=128).measure(2)
    assert qmp.asked[0][1]["sample-pages"] == 128


def test_arguments_out_of_range_are_named():
    with pytest.raises(ValueError, match="mode is 'guess'"):
        DirtyRate(Answers(), "guess")
    with pytest.raises(ValueError, match="sample_pages is 5"):
        DirtyRate(Answers(), sample_pages=5)
    for seconds in (0, 61):
        with pytest.raises(ValueError, match=f"seconds is {seconds}"):
            DirtyRate(Answers()).measure(seconds)
