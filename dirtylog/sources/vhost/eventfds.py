"""Notices between a device and its front end: eventfds that come with messages."""

from __future__ import annotations

import contextlib
import os

from dirtylog.sources._channel import PeerError

__all__ = ["given_up", "notify", "take_notice", "taken"]


def taken(old: int, descriptors: list[int]) -> int:
    """Take over the eventfd of a message in the place of another one; none is -1."""
    if descriptors:
        what = os.readlink(f"/proc/self/fd/{descriptors[0]}")
        if what != "anon_inode:[eventfd]":
            # A file or a pipe could keep us waiting, whatever is asked of it.
            raise PeerError(f"the front end sent {what} to be notified by; an eventfd is needed")
        # Also for the front end, which shares it: a notice that nobody has taken yet is a notice.
        os.set_blocking(descriptors[0], False)
    new = descriptors.pop(0) if descriptors else -1
    given_up(old)
    return new


def given_up(eventfd: int) -> int:
    """Close an eventfd, if it is one; return what stands for none."""
    if eventfd >= 0:
        os.close(eventfd)
    return -1


def notify(eventfd: int) -> None:
    """Give notice, if anybody wants one."""
    if eventfd >= 0:
        with contextlib.suppress(BlockingIOError):  # its counter is full: whoever waits has been told
            os.eventfd_write(eventfd, 1)


def take_notice(eventfd: int) -> None:
    """Take what notices there are, and wait for none."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(eventfd)
