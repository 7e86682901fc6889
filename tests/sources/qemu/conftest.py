"""A storage daemon with a disk, and a qemu-io that writes to it."""

from types import SimpleNamespace

import pytest

from ...qemu import Daemon, Writer


@pytest.fixture
def daemon(tmp_path):
    made = Daemon(tmp_path)
    made.start()
    yield made
    made.kill()


@pytest.fixture
def exported(daemon):
    """The disk, with a monitor, exported to be written as "w", and a qemu-io that writes it."""
    with daemon.qmp() as qmp:
        qmp.execute("block-export-add", {"type": "nbd", "id": "w", "node-name": "disk", "name": "w", "writable": True})
        writer = Writer(daemon.nbd, "w")
        yield SimpleNamespace(daemon=daemon, qmp=qmp, writer=writer, write=writer.write, nbd=daemon.nbd)
        writer.close()
