"""A harvest of another process that is interrupted anywhere: its pages are in the next one (I5)."""

import contextlib
import itertools
import warnings

import pytest

from dirtylog.errors import DirtyLogError, IncompleteLogWarning

from ..sources.test_process import Puppet, attach, pages_at
from ..sources.test_process_launch import Told

pytestmark = [
    pytest.mark.thread_unsafe(reason="traces belong to the process"),
    pytest.mark.usefixtures("plain_programs"),
]
# All that a harvest goes through.
FILES = ("process/process.py", "process/stretches.py", "process/numbering.py", "process/members.py")


def test_a_harvest_interrupted_anywhere_has_its_pages_in_the_next(interrupt_class):
    lost = []
    with Puppet() as puppet, attach(puppet.pid, select=lambda area: area.kind == "anonymous") as process:
        old = puppet.do("new(64)")
        process.harvest()
        for n in itertools.count(1):
            # One page that was watched, and one of memory that is new.
            puppet.do(f"(poke({old}, {n % 64}), held.update(new=new(4)), poke(held['new'], 2))")
            new = puppet.do("held['new']")
            answers = []
            interrupt = interrupt_class(n, *FILES)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", IncompleteLogWarning)
                with contextlib.suppress(KeyboardInterrupt), interrupt.active():
                    answers.append(process.harvest())
                if interrupt.where:
                    answers.append(process.harvest())
            seen = set().union(*(pages_at(process, answer, old, 64) for answer in answers))
            seen_new = set().union(*(pages_at(process, answer, new, 4) for answer in answers))
            if n % 64 not in seen or 2 not in seen_new:
                lost.append(interrupt.where)
            puppet.do(f"libc.munmap({new}, 4 * PAGE)")
            if not interrupt.where:
                break
    # The return from C to the caller: C has looked for signals just before.
    assert len(lost) <= 1
    assert n > 30


def test_what_a_program_wrote_last_survives_an_interrupt(monkeypatch):
    """The end is seen once: whoever was interrupted right then still gets the pages."""

    def interrupted():
        raise KeyboardInterrupt

    with Told() as told:
        process = told.program.process
        address = told.do("new(8)")
        process.harvest()
        told.tell(f"(poke({address}, 5), os._exit(0))")
        assert told.program.wait(60)
        with monkeypatch.context() as patch:
            patch.setattr(process, "_new_children", interrupted)
            with pytest.raises(KeyboardInterrupt):
                process.harvest()
        with pytest.warns(IncompleteLogWarning, match="failed half-way"):
            assert 5 in pages_at(process, process.harvest(), address, 8)
        with pytest.raises(DirtyLogError, match="has ended"):
            process.harvest()
