"""What every resource owes whoever closes it."""

import os
import sys

import pytest

from dirtylog.sources._resource import Resource
from dirtylog.sources.kvm import _kvm
from dirtylog.sources.process import _remote


class Racing(Resource):
    """Closed by somebody else in the moment between the question and the answer."""

    def __init__(self):
        super().__init__()
        self.releases = 0
        self.flag = False
        self.rival = None

    @property
    def _closed(self):
        answer = self.flag
        rival, self.rival = self.rival, None
        if rival:
            rival()
        return answer

    @_closed.setter
    def _closed(self, value):
        self.flag = value

    def _release(self):
        self.releases += 1


def test_of_two_that_close_at_once_one_gives_back():
    resource = Racing()
    resource.rival = resource.close
    resource.close()
    assert (resource.releases, resource.closed) == (1, True)
    resource.close()
    assert resource.releases == 1


def test_what_the_last_object_misses_at_the_end_of_the_interpreter_is_not_an_error(monkeypatch):
    class Late(Resource):
        _closed = False

        def _release(self):
            raise TypeError("'NoneType' object is not callable")

    noticed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: noticed.append(unraisable.exc_type))
    for ending in (False, True):
        monkeypatch.setattr(Resource, "_ending", lambda _, ending=ending: ending)
        with pytest.warns(ResourceWarning):
            Late()
    assert noticed == [TypeError]


@pytest.mark.parametrize("arguments", [(-1, b"no text"), (-1,)], ids=str)
def test_a_machine_that_refuses_its_arguments_closes_nobodys_descriptor(arguments):
    """What was never set is 0, which is a descriptor."""
    before = os.fstat(0)
    with pytest.raises(TypeError):
        _kvm.Handle(*arguments)
    assert os.path.samestat(os.fstat(0), before)


def test_a_watch_that_refuses_its_arguments_closes_nobodys_descriptor():
    before = os.fstat(0)
    with pytest.raises(TypeError):
        _remote.Watch("no number", -1)
    assert os.path.samestat(os.fstat(0), before)
