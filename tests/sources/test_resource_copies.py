"""What every owner of something of the system's refuses."""

import copy
import pickle

import pytest

import dirtylog as dl

from ..leaks import descriptors


@pytest.fixture(params=["SharedLog", "Tracker", "Kvm"])
def resource(request):
    """One of each kind that can be had without a virtual machine."""
    if request.param == "SharedLog":
        made = dl.SharedLog.create(10)
    elif request.param == "Tracker":
        made = dl.track(dl.zeros(10, "u1"), "compare")
    else:
        from dirtylog.sources import kvm

        if not (probed := kvm.probe()).available:
            pytest.skip(f"KVM: {probed.reason}")
        made = kvm.Kvm()
    with made:
        yield made


@pytest.mark.parametrize("another", [copy.copy, copy.deepcopy, pickle.dumps])
def test_no_second_owner_can_be_made(resource, another):
    before = descriptors()
    with pytest.raises(TypeError, match=f"a {type(resource).__name__} is neither copied nor pickled"):
        another(resource)
    assert not descriptors() - before
    assert not resource.closed
