"""Any sequence of operations on page sets, in whatever form they are kept, is that of sets of integers."""

import copy
import operator
import pickle

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

import dirtylog as dl

OPERATORS = {"|": operator.or_, "&": operator.and_, "-": operator.sub, "^": operator.xor}


def bits_of(pages, npages):
    bits = np.zeros(-(-npages // 64) * 64, np.uint8)
    bits[sorted(pages)] = 1
    return np.packbits(bits, bitorder="little").view("<u8").astype(np.uint64)


def from_words(pages, npages, size, exact):
    return dl.DirtyPages.from_words(bits_of(pages, npages), npages, size, exact=exact)


def from_indices(pages, npages, size, exact):
    return dl.DirtyPages.from_indices(sorted(pages, reverse=True), npages, size, exact=exact)


def from_runs(pages, npages, size, exact):
    return dl.DirtyPages.from_runs(
        np.array([[page, 1] for page in pages], np.int64).reshape(-1, 2), npages, size, exact=exact
    )


def adopted(pages, npages, size, exact):
    return dl.DirtyPages._adopt_words(bits_of(pages, npages), npages, size, exact)


class SetMachine(RuleBasedStateMachine):
    """Each page set is kept beside the set of integers it stands for, and must stand for it ever after."""

    made = Bundle("made")

    @initialize(npages=st.sampled_from([1, 63, 64, 65, 513, 5000, 40_000]), size=st.sampled_from([1, 512, 4096]))
    def start(self, npages, size):
        self.npages, self.size = npages, size
        self.all = []

    def keep(self, pages, numbers, exact):
        self.all.append((pages, frozenset(numbers), exact))
        return self.all[-1]

    @rule(target=made, data=st.data(), make=st.sampled_from([from_words, from_indices, from_runs, adopted]),
          exact=st.booleans())  # fmt: skip
    def make(self, data, make, exact):
        page = st.integers(0, self.npages - 1)
        few = st.sets(page, max_size=8)
        many = st.tuples(page, page).map(lambda ends: set(range(min(ends), max(ends) + 1)))
        numbers = data.draw(st.one_of(few, many))
        return self.keep(make(numbers, self.npages, self.size, exact), numbers, exact)

    @rule(target=made, exact=st.booleans())
    def all_or_none(self, exact):
        if exact:
            return self.keep(dl.DirtyPages._empty(self.npages, self.size), (), True)
        return self.keep(dl.DirtyPages._all(self.npages, self.size), range(self.npages), False)

    @rule(target=made, a=made, b=made, name=st.sampled_from(sorted(OPERATORS)))
    def combine(self, a, b, name):
        apply = OPERATORS[name]
        return self.keep(apply(a[0], b[0]), apply(a[1], b[1]), a[2] and b[2])

    @rule(target=made, a=made, how=st.sampled_from([copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))]))
    def again(self, a, how):
        return self.keep(how(a[0]), a[1], a[2])

    @rule(target=made, a=made)
    def through_a_bitmap(self, a):
        bitmap = dl.DirtyBitmap(self.npages, self.size)
        bitmap.merge(a[0])
        return self.keep(bitmap.harvest(), a[1], True)

    @rule(target=made, a=made)
    def through_bytes(self, a):
        return self.keep(dl.DirtyPages.from_bytes(a[0].to_bytes(), self.npages, self.size), a[1], True)

    @rule(a=made)
    def its_words_can_be_asked_for_and_not_changed(self, a):
        with pytest.raises(ValueError, match="read-only"):
            a[0].words[:1] = 1

    @rule(a=made, data=st.data())
    def membership(self, a, data):
        page = data.draw(st.integers(-1, self.npages))
        assert (page in a[0]) == (page in a[1])

    @rule(a=made, b=made)
    def comparison(self, a, b):
        assert (a[0] == b[0]) == (a[1] == b[1])
        assert a[0] != b[0] or hash(a[0]) == hash(b[0])

    @rule(a=made)
    def another_space_is_refused(self, a):
        for other in (dl.DirtyPages._empty(self.npages + 1, self.size), dl.DirtyPages._empty(self.npages, 8192)):
            for apply in OPERATORS.values():
                with pytest.raises(ValueError, match=r"page"):
                    apply(a[0], other)

    @invariant()
    def nothing_that_was_made_has_changed(self):
        for pages, numbers, exact in getattr(self, "all", ())[-4:]:
            assert (pages.count, pages.exact, pages.npages) == (len(numbers), exact, self.npages)

    def teardown(self):
        for pages, numbers, _ in getattr(self, "all", ()):
            listed = sorted(numbers)
            assert pages.indices().tolist() == listed
            assert [page for first, count in pages.runs().tolist() for page in range(first, first + count)] == listed
            assert np.array_equal(pages.words, bits_of(numbers, self.npages))


TestSetMachine = SetMachine.TestCase


class AliasMachine(RuleBasedStateMachine):
    """Two bitmaps over one piece of foreign memory, its owner, and the functions on words: all see the same bits."""

    @initialize(npages=st.sampled_from([1, 64, 65, 130, 513, 4097]))
    def start(self, npages):
        self.npages = npages
        self.words = np.zeros(-(-npages // 64), np.uint64)
        self.views = [
            dl.DirtyBitmap.from_buffer(self.words, npages),
            dl.DirtyBitmap.from_buffer(self.words.data, npages),
        ]
        self.pages = set()

    def some(self, data):
        return data.draw(st.sets(st.integers(0, self.npages - 1), max_size=10))

    @rule(data=st.data(), view=st.integers(0, 1))
    def mark(self, data, view):
        pages = self.some(data)
        self.views[view].mark_pages(list(pages))
        self.pages |= pages

    @rule(data=st.data())
    def the_owner_writes(self, data):
        pages = self.some(data)
        self.words |= bits_of(pages, self.npages)
        self.pages |= pages

    @rule(data=st.data(), view=st.integers(0, 1))
    def merge_shifted(self, data, view):
        first = data.draw(st.integers(0, self.npages - 1))
        part = data.draw(st.sets(st.integers(0, self.npages - 1 - first), max_size=10))
        self.views[view].merge(dl.DirtyPages.from_indices(list(part), self.npages - first), first)
        self.pages |= {page + first for page in part}

    @rule(data=st.data(), view=st.integers(0, 1))
    def clear(self, data, view):
        pages = self.some(data)
        self.views[view].clear(dl.DirtyPages.from_indices(list(pages), self.npages))
        self.pages -= pages

    @rule(data=st.data(), view=st.integers(0, 1))
    def harvest_a_range(self, data, view):
        first = data.draw(st.integers(0, self.npages))
        inside = set(range(first, first + data.draw(st.integers(0, self.npages - first))))
        out = np.full(self.words.size, 7, np.uint64)
        assert set(self.views[view].harvest(first, len(inside), out)) == self.pages & inside
        assert np.array_equal(out, bits_of(self.pages & inside, self.npages))
        self.pages -= inside

    @rule()
    def harvest_the_words(self):
        assert set(dl.indices(dl.harvest_words(self.words)).tolist()) == self.pages
        self.pages = set()

    @rule(view=st.integers(0, 1))
    def a_bit_past_the_end_is_refused_or_never_seen(self, view):
        if self.npages % 64:
            self.words[-1] |= np.uint64(1 << 63)
            with pytest.raises(ValueError, match="bit"):
                dl.DirtyBitmap.from_buffer(self.words, self.npages)
            assert set(self.views[view].peek()) <= set(range(self.npages))
            self.words[-1] &= np.uint64((1 << 63) - 1)

    @invariant()
    def they_agree(self):
        if hasattr(self, "pages"):
            assert {view.count() for view in self.views} == {len(self.pages)}
            assert np.array_equal(self.words, bits_of(self.pages, self.npages))


TestAliasMachine = AliasMachine.TestCase
