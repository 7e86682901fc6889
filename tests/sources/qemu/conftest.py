"""A storage daemon with a disk, and a qemu-io that writes to it: one for all tests of a module."""

from ...qemu import machine, machines

__all__ = ["machine", "machines"]
