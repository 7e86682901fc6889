"""The parts that a watched process is made of, each alone: how pages are numbered, and when mappings are read."""

import os

import pytest

import dirtylog as dl
from dirtylog.sources.process import members
from dirtylog.sources.process.members import Member
from dirtylog.sources.process.numbering import Numbering


def test_numbers_that_were_somebodys_are_given_away_last():
    numbers = Numbering(100, 7)
    assert numbers.allocate(40) == (0, False)
    assert numbers.allocate(30) == (40, False)
    numbers.release(0, 40)
    assert numbers.allocate(30) == (70, False)
    assert numbers.used == 100
    assert numbers.allocate(15) == (0, True)
    assert numbers.allocate(25) == (15, True)
    with pytest.raises(dl.DirtyLogError, match=r"process 7 has mapped 1 pages more than the 100 .* spare=202"):
        numbers.allocate(1)


def test_neighbours_that_are_released_become_one():
    numbers = Numbering(90, 7)
    for _ in range(3):
        numbers.allocate(30)
    for first in (60, 0, 30):
        numbers.release(first, 30)
    assert numbers.allocate(90) == (0, True)


def test_mappings_are_taken_apart_again_only_if_they_have_changed(monkeypatch):
    taken_apart = []

    def parsed(pid, text):
        taken_apart.append(text)
        return [len(taken_apart)]

    class Watch:
        pid = os.getpid()

    monkeypatch.setattr(members, "parsed", parsed)
    texts = iter([b"a", b"a", b"b", b"a"])
    monkeypatch.setattr(members.Path, "read_bytes", lambda path: next(texts))
    member = Member(os.getpid(), Watch(), lambda areas: areas, sparse=False)
    assert [member.mappings() for _ in range(4)] == [[1], [1], [2], [3]]
    assert taken_apart == [b"a", b"b", b"a"]
