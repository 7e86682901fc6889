"""Backups of a disk for as long as one likes: 50 of them for each granularity, the daemon killed twice."""

import pytest

from ..qemu import Machine
from ..sinks.test_backup import soak

pytestmark = pytest.mark.stress


@pytest.mark.parametrize("granularity", [1 << shift for shift in range(12, 21)])
def test_the_disk_equals_each_of_fifty_backups(stress, tmp_path, granularity):
    machine = Machine(tmp_path, granularity, 64 << 20)
    try:
        soak(machine, tmp_path / "backups", 50, granularity, kills={17, 34})
        stress.count("backups", 50)
    finally:
        machine.end(kill=True)
