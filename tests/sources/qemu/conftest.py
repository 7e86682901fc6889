"""A storage daemon with a disk, and a qemu-io that writes to it: one for all tests of a module."""

import pytest

from ...qemu import SIZE, Machine, Machines


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    lent = Machines(lambda: Machine(tmp_path_factory.mktemp("machine"), size=SIZE))
    yield lent
    lent.end()


@pytest.fixture
def exported(machines):
    """The disk, with a monitor, exported to be written as "w", and a qemu-io that writes it."""
    yield machines.lend()
    machines.take_back()
