"""A log of several sources and observers in any order of events, against plain sets."""

import warnings

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

import dirtylog as dl

SPACE = 700  # a few words and more than one cache line of them


class Gone(Exception):
    """What a source of this test raises."""


class Source:
    """A bitmap that can be told to fail, to lose its bits on the way, or to report inexactly."""

    page_size = 4096

    def __init__(self, npages):
        self.npages = npages
        self.bitmap = dl.DirtyBitmap(npages)
        self.marked = set()
        self.fails = self.inexact = False

    def harvest(self):
        if self.fails:
            self.bitmap.harvest()
            raise Gone
        if self.inexact:
            self.inexact = False
            self.bitmap.harvest()
            return dl.DirtyPages._all(self.npages)
        return self.bitmap.harvest()


class Consumer:
    """What an observer should hold."""

    def __init__(self, observer, pending=()):
        self.observer = observer
        self.pending, self.exact = set(pending), True
        self.epoch = self.held = None
        self.committed = 0


class LogMachine(RuleBasedStateMachine):
    sources, consumers = Bundle("sources"), Bundle("consumers")

    def __init__(self):
        super().__init__()
        self.log = dl.DirtyLog()
        self.attached = {}  # source: first page
        self.suspects = set()  # failed, and not vouched for since
        self.alive = []
        self.npages = self.made = 0

    def pages_of(self, source):
        first = self.attached[source]
        return set(range(first, first + source.npages))

    def model_harvest(self):
        """What one collect does to the sets; False where a source fails on the way."""
        for source, first in self.attached.items():
            if source in self.suspects:
                self.suspects.discard(source)
                self.give(self.pages_of(source), exact=False)
            if source.fails:
                self.suspects.add(source)
                source.marked.clear()
                return False
            if source.inexact:
                self.give(self.pages_of(source), exact=False)
            self.give({first + page for page in source.marked}, exact=True)
            source.marked.clear()
        return True

    def give(self, pages, exact):
        for consumer in self.alive:
            consumer.pending |= pages
            consumer.exact = consumer.exact and exact

    @rule(target=sources, npages=st.integers(0, 300), first=st.integers(0, SPACE - 300), everything=st.booleans())
    def attach(self, npages, first, everything):
        source = Source(npages)
        self.log.attach(source, first, everything=everything)
        self.attached[source] = first
        self.npages = max(self.npages, first + npages)
        if everything:
            self.give(self.pages_of(source), exact=True)
        return source

    @rule(source=consumes(sources))
    def detach(self, source):
        inexact = source.inexact
        # A suspect says so; and so does one that fails at the end.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.log.detach(source)
        assert bool(caught) == (source.fails or source in self.suspects)
        if source.fails or inexact or source in self.suspects:
            self.give(self.pages_of(source), exact=False)
        if not source.fails:
            self.give({self.attached[source] + page for page in source.marked}, exact=True)
        self.suspects.discard(source)
        del self.attached[source]

    @rule(source=sources, pages=st.sets(st.integers(0, 299), max_size=8))
    def write(self, source, pages):
        for page in pages:
            if page < source.npages:
                source.bitmap.mark(page)
                source.marked.add(page)

    @rule(source=sources)
    def write_all(self, source):
        source.bitmap.fill()
        source.marked = set(range(source.npages))

    @rule(source=sources, fails=st.booleans())
    def break_or_mend(self, source, fails):
        source.fails = fails

    @rule(source=sources)
    def lose_track(self, source):
        source.inexact = True

    @rule(target=consumers, everything=st.booleans())
    def observe(self, everything):
        self.made += 1
        pages = set().union(*map(self.pages_of, self.attached)) if everything else set()
        consumer = Consumer(self.log.observer(str(self.made), everything=everything), pages)
        self.alive.append(consumer)
        return consumer

    @rule(consumer=consumes(consumers))
    def close(self, consumer):
        consumer.observer.close()
        self.alive.remove(consumer)

    @rule(consumer=consumers)
    def enter(self, consumer):
        epoch = consumer.observer.collect()
        if consumer.epoch is not None:
            with pytest.raises(dl.DirtyLogError, match="holds epoch"):
                epoch.__enter__()
            return
        warned = {source for source in self.attached if source in self.suspects}
        if not self.model_harvest():
            with pytest.raises(Gone):
                epoch.__enter__()
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            epoch.__enter__()
        assert len(caught) >= len(warned)
        assert set(epoch.pages.indices().tolist()) == consumer.pending
        assert epoch.pages.exact == consumer.exact
        assert epoch.pages.npages == self.npages
        assert epoch.number == consumer.committed + 1
        consumer.epoch, consumer.held = epoch, (consumer.pending, consumer.exact)
        consumer.pending, consumer.exact = set(), True

    @precondition(lambda self: any(consumer.epoch for consumer in self.alive))
    @rule(data=st.data(), how=st.sampled_from(["commit", "fail", "drop"]))
    def leave(self, data, how):
        consumer = data.draw(st.sampled_from([consumer for consumer in self.alive if consumer.epoch]))
        if how == "drop":
            consumer.epoch = None
        else:
            epoch, consumer.epoch = consumer.epoch, None
            epoch.__exit__(Gone if how == "fail" else None, None, None)
        if how == "commit":
            consumer.committed += 1
        else:
            consumer.pending |= consumer.held[0]
            consumer.exact = consumer.exact and consumer.held[1]

    @invariant()
    def the_page_space_only_grows(self):
        assert self.log.npages == self.npages
        assert [each.source for each in self.log.sources] == list(self.attached)
        assert [each.name for each in self.log.observers] == [each.observer.name for each in self.alive]


# Hypothesis parses source files for its reports, which CPython 3.11 cannot do in several threads at once.
TestLog = pytest.mark.thread_unsafe(reason="hypothesis parses source files")(LogMachine.TestCase)
