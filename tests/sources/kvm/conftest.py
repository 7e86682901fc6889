"""A virtual machine for every test of KVM."""

import pytest

from dirtylog.sources import kvm


@pytest.fixture
def vm():
    with kvm.Kvm() as system, system.create_vm() as vm:
        yield vm
