"""The compiled core once more in plain Python: oracle of its tests, baseline of its benchmarks, its explanation.

Every function and class here does what the one of the same name in `dirtylog`
does, on lists of Python integers in place of 64-bit words in memory. Nothing
is vectorised, skipped or kept sparse: each operation is the loop that the
kernel's source spells out, so that it can be read next to it.

Notes
-----
The one thing left out is concurrency. Where the core exchanges a word
atomically, this module reads it and then writes it: two threads need a lock of
their own round it.

Examples
--------
>>> words = [0] * words_for(130)
>>> mark_range(words, 62, 4)
>>> mark(words, 129)
>>> indices(words)
[62, 63, 64, 65, 129]
>>> runs(words)
[(62, 4), (129, 1)]
>>> [hex(word) for word in harvest_words(words)]
['0xc000000000000000', '0x3', '0x2']
>>> words
[0, 0, 0]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from operator import index

__all__ = [
    "WORD_PAGES",
    "DirtyBitmap",
    "DirtyPages",
    "clear_range",
    "ffs",
    "fls",
    "harvest_words",
    "indices",
    "mark",
    "mark_range",
    "popcount",
    "runs",
    "tail_mask",
    "words_for",
    "write_protect_pages",
    "write_protect_range",
]

WORD_PAGES = 64
ALL_PAGES = (1 << WORD_PAGES) - 1


# One word ---------------------------------------------------------------------


def ffs(mask: int) -> int:
    """Number the lowest set bit, as the kernel's ``__ffs``: 0-based, undefined (here: refused) on 0.

    Examples
    --------
    >>> ffs(0b1000)
    3
    """
    check_mask(mask)
    return (mask & -mask).bit_length() - 1


def fls(mask: int) -> int:
    """Number the highest set bit, as the kernel's ``__fls``: 0-based, undefined (here: refused) on 0.

    Examples
    --------
    >>> fls(0b1010)
    3
    """
    check_mask(mask)
    return mask.bit_length() - 1


def check_mask(mask: int) -> None:
    """Refuse a mask with no bit to find, or with bits that a word does not have."""
    if not 0 < mask <= ALL_PAGES:
        raise ValueError(f"mask is {mask:#x}: ffs and fls need 1 to {ALL_PAGES:#x}")


def words_for(npages: int) -> int:
    """Count the words that hold `npages` bits."""
    return -(-npages // WORD_PAGES)


def tail_mask(npages: int) -> int:
    """Select the bits of the last word that stand for pages (I7); all of them when it is full.

    Examples
    --------
    >>> bin(tail_mask(67)), tail_mask(64) == 2**64 - 1
    ('0b111', True)
    """
    return ALL_PAGES >> (-npages % WORD_PAGES)


def bits_of(mask: int) -> Iterator[int]:
    """Number the set bits of one word, lowest first."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


# Masked write protection --------------------------------------------------------


def write_protect_pages(word: int, mask: int) -> list[int]:
    """Name the pages that x86 write-protects for one word of a harvest: each set bit of the mask.

    Parameters
    ----------
    word : int
        Number of the word in the bitmap.
    mask : int
        The word's harvested value.

    References
    ----------
    ``kvm_mmu_write_protect_pt_masked`` in Linux ``arch/x86/kvm/mmu/mmu.c``.

    Examples
    --------
    >>> write_protect_pages(1, 0b10010)
    [65, 68]
    """
    return [word * WORD_PAGES + bit for bit in bits_of(mask)]


def write_protect_range(word: int, mask: int) -> tuple[int, int]:
    """Bound the pages that ARM write-protects for one word of a harvest: from the lowest set bit to the highest.

    Clean pages between the two are write-protected with the dirty ones: a
    fault more, a page-table walk less.

    Returns
    -------
    tuple of int
        First page, and the page after the last.

    References
    ----------
    ``kvm_arch_mmu_write_protect_pt_masked`` and ``stage2_wp_range`` in Linux ``arch/arm/kvm/mmu.c``.

    Examples
    --------
    >>> write_protect_range(1, 0b10010)
    (65, 69)
    """
    base = word * WORD_PAGES
    return base + ffs(mask), base + fls(mask) + 1


# Words --------------------------------------------------------------------------


def masks_of_range(first: int, count: int) -> Iterator[tuple[int, int]]:
    """Split a range of pages into ``(word number, mask)``, one a word: what makes a range cost one atomic a word."""
    end = first + count
    while first < end:
        word, bit = divmod(first, WORD_PAGES)
        taken = min(WORD_PAGES - bit, end - first)
        yield word, (ALL_PAGES >> (WORD_PAGES - taken)) << bit
        first += taken


def mark(words: MutableSequence[int], page: int) -> None:
    """Set the bit of a page: page ``64*i + b`` is bit ``b`` of word ``i``."""
    word, bit = divmod(page, WORD_PAGES)
    words[word] |= 1 << bit


def mark_range(words: MutableSequence[int], first: int, count: int) -> None:
    """Set the bits of `count` pages from `first` on."""
    for word, mask in masks_of_range(first, count):
        words[word] |= mask


def clear_range(words: MutableSequence[int], first: int, count: int) -> None:
    """Clear the bits of `count` pages from `first` on."""
    for word, mask in masks_of_range(first, count):
        words[word] &= ~mask


def harvest_words(words: MutableSequence[int]) -> list[int]:
    """Take every word and leave zero in its place.

    The loop of ``kvm_get_dirty_log_protect``: a clean word is not written to,
    a dirty one is exchanged with zero.

    Returns
    -------
    list of int
        The words as they were.
    """
    snapshot = [0] * len(words)
    for number, mask in enumerate(words):
        if mask:
            words[number] = 0
            snapshot[number] = mask
    return snapshot


def popcount(words: Iterable[int]) -> int:
    """Count the set bits.

    Examples
    --------
    >>> popcount([0b101, 0, 1 << 63])
    3
    """
    return sum(mask.bit_count() for mask in words)


def indices(words: Iterable[int]) -> list[int]:
    """Number the set bits, in ascending order."""
    pages = []
    for number, mask in enumerate(words):
        base = number * WORD_PAGES
        while mask:
            lowest = mask & -mask
            pages.append(base + lowest.bit_length() - 1)
            mask ^= lowest
    return pages


def runs(words: Iterable[int]) -> list[tuple[int, int]]:
    """Name the runs of adjacent set bits as ``(first, count)``, in ascending order; a run crosses words."""
    return runs_of_pages(indices(words))


def runs_of_pages(pages: Iterable[int]) -> list[tuple[int, int]]:
    """Join ascending page numbers into runs."""
    found: list[tuple[int, int]] = []
    for page in pages:
        if found and page == sum(found[-1]):
            first, count = found[-1]
            found[-1] = first, count + 1
        else:
            found.append((page, 1))
    return found


# Arguments ----------------------------------------------------------------------


def checked_page(page: int, npages: int) -> int:
    """Return `page` as an integer below `npages`; negative numbers do not wrap round."""
    if isinstance(page, bool):
        raise TypeError("a page number is an integer, not a bool")
    number: int = index(page)
    if not 0 <= number < npages:
        raise IndexError(f"page {number} is outside the bitmap's pages 0 to {npages - 1}")
    return number


def checked_range(first: int, count: int | None, npages: int) -> tuple[int, int]:
    """Return a range that lies inside `npages` pages; without `count`, all from `first` on."""
    first = index(first)
    count = max(npages - first, 0) if count is None else index(count)
    if count < 0:
        raise ValueError(f"count is {count}: a range has 0 pages or more")
    if first < 0 or first + count > npages:
        raise IndexError(f"pages {first} to {first + count} are not inside the bitmap's {npages} pages")
    return first, count


def checked_size(npages: int, page_size: int) -> tuple[int, int]:
    """Return a size that a bitmap can have: at least one page, page size a power of two."""
    npages, page_size = index(npages), index(page_size)
    if npages < 0:
        raise ValueError(f"npages is {npages}: a bitmap has 0 pages or more")
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"page_size is {page_size}: a page's size is a power of two")
    return npages, page_size


def checked_words(words: Sequence[int], npages: int) -> list[int]:
    """Return a copy of words that hold exactly `npages` bits, the tail clear (I7)."""
    if len(words) != words_for(npages):
        raise ValueError(f"{len(words)} words for {npages} pages: {words_for(npages)} are needed")
    if words and words[-1] & ~tail_mask(npages):
        raise ValueError(f"bits at or past page {npages} are set")
    return list(words)


# The two classes ------------------------------------------------------------------


class DirtyPages:
    """What a harvest found: an immutable set of page numbers, kept as words.

    Parameters
    ----------
    words : sequence of int
        ``ceil(npages/64)`` words, bits past `npages` clear.
    npages : int
        Pages that the source has, dirty or not.
    page_size : int, optional
        Bytes per page.
    exact : bool, optional
        False when the source lost track and reported everything.

    Examples
    --------
    >>> first = DirtyPages.from_indices([3, 1, 2], 100)
    >>> later = DirtyPages.from_runs([(2, 4)], 100)
    >>> (first | later).runs(), list(first & later), list(later - first)
    ([(1, 5)], [2, 3], [4, 5])
    """

    def __init__(self, words: Sequence[int], npages: int, page_size: int = 4096, *, exact: bool = True) -> None:
        self.npages: int
        self.page_size: int
        self.npages, self.page_size = checked_size(npages, page_size)
        self.words: tuple[int, ...] = tuple(checked_words(words, self.npages))
        self.exact = exact

    @classmethod
    def from_words(cls, words: Sequence[int], npages: int, page_size: int = 4096, *, exact: bool = True) -> DirtyPages:
        """Take a copy of the words."""
        return cls(words, npages, page_size, exact=exact)

    @classmethod
    def from_indices(
        cls, pages: Iterable[int], npages: int, page_size: int = 4096, *, exact: bool = True
    ) -> DirtyPages:
        """Set the bits of page numbers, in any order and as often as they like."""
        words = [0] * words_for(npages)
        for page in pages:
            mark(words, checked_page(page, npages))
        return cls(words, npages, page_size, exact=exact)

    @classmethod
    def from_runs(
        cls, runs: Iterable[tuple[int, int]], npages: int, page_size: int = 4096, *, exact: bool = True
    ) -> DirtyPages:
        """Set the bits of runs ``(first, count)``, in any order, overlapping or not."""
        words = [0] * words_for(npages)
        for first, count in runs:
            mark_range(words, *checked_range(first, count, npages))
        return cls(words, npages, page_size, exact=exact)

    @classmethod
    def from_bytes(cls, data: bytes, npages: int, page_size: int = 4096) -> DirtyPages:
        """Read little-endian words: the memory of KVM's and vhost's bitmaps."""
        if len(data) % 8:
            raise ValueError(f"{len(data)} bytes are not a whole number of 8-byte words")
        words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
        return cls(words, npages, page_size)

    def to_bytes(self) -> bytes:
        """Write the words, little-endian."""
        return b"".join(mask.to_bytes(8, "little") for mask in self.words)

    @property
    def count(self) -> int:
        """Number of dirty pages."""
        return popcount(self.words)

    @property
    def nbytes(self) -> int:
        """Bytes in the dirty pages."""
        return self.count * self.page_size

    def indices(self) -> list[int]:
        """Page numbers, ascending."""
        return indices(self.words)

    def runs(self) -> list[tuple[int, int]]:
        """Runs of adjacent pages as ``(first, count)``, ascending."""
        return runs(self.words)

    def combined(self, other: DirtyPages, words: Iterable[int]) -> DirtyPages:
        """Wrap the words of a set operation, once both sides are known to speak of the same pages."""
        return DirtyPages(list(words), self.npages, self.page_size, exact=self.exact and other.exact)

    def check_same_pages(self, other: DirtyPages) -> None:
        """Refuse to combine sets over different pages."""
        if (self.npages, self.page_size) != (other.npages, other.page_size):
            raise ValueError(
                f"{self.npages} pages of {self.page_size} bytes cannot be combined with "
                f"{other.npages} pages of {other.page_size} bytes"
            )

    def __or__(self, other: DirtyPages) -> DirtyPages:
        """Unite: dirty in either."""
        self.check_same_pages(other)
        return self.combined(other, (a | b for a, b in zip(self.words, other.words, strict=True)))

    def __and__(self, other: DirtyPages) -> DirtyPages:
        """Intersect: dirty in both."""
        self.check_same_pages(other)
        return self.combined(other, (a & b for a, b in zip(self.words, other.words, strict=True)))

    def __sub__(self, other: DirtyPages) -> DirtyPages:
        """Subtract: dirty in the first, clean in the second."""
        self.check_same_pages(other)
        return self.combined(other, (a & ~b for a, b in zip(self.words, other.words, strict=True)))

    def __xor__(self, other: DirtyPages) -> DirtyPages:
        """Differ: dirty in exactly one."""
        self.check_same_pages(other)
        return self.combined(other, (a ^ b for a, b in zip(self.words, other.words, strict=True)))

    def __eq__(self, other: object) -> bool:
        """Compare the pages; `exact` says how they were found, not which they are."""
        if not isinstance(other, DirtyPages):
            return NotImplemented
        return (self.npages, self.page_size, self.words) == (other.npages, other.page_size, other.words)

    def __hash__(self) -> int:
        """Hash what `==` compares."""
        return hash((self.npages, self.page_size, self.words))

    def __len__(self) -> int:
        """Count the dirty pages."""
        return self.count

    def __iter__(self) -> Iterator[int]:
        """Go through the page numbers, ascending."""
        return iter(self.indices())

    def __contains__(self, page: object) -> bool:
        """Say whether a page is dirty; what is not a page of the source is not."""
        if not isinstance(page, int) or not 0 <= page < self.npages:
            return False
        word, bit = divmod(page, WORD_PAGES)
        return bool(self.words[word] >> bit & 1)


class DirtyBitmap:
    """One bit per page: set by whoever writes, taken by whoever asks.

    Parameters
    ----------
    npages : int
        Number of pages.
    page_size : int, optional
        Bytes per page.

    Examples
    --------
    >>> bitmap = DirtyBitmap(1000)
    >>> bitmap.mark_pages([5, 6, 7, 900])
    >>> bitmap.harvest(0, 100).indices(), bitmap.harvest().indices(), bitmap.count()
    ([5, 6, 7], [900], 0)
    """

    def __init__(self, npages: int, page_size: int = 4096) -> None:
        self.npages: int
        self.page_size: int
        self.npages, self.page_size = checked_size(npages, page_size)
        self.words: list[int] = [0] * words_for(self.npages)

    def mark(self, page: int) -> None:
        """Set one page's bit."""
        mark(self.words, checked_page(page, self.npages))

    def mark_range(self, first: int, count: int) -> None:
        """Set the bits of adjacent pages."""
        mark_range(self.words, *checked_range(first, count, self.npages))

    def mark_pages(self, pages: Iterable[int]) -> None:
        """Set the bits of any pages; all are looked at before the first is set."""
        for page in [checked_page(page, self.npages) for page in pages]:
            mark(self.words, page)

    def merge(self, dirty: DirtyPages, first_page: int = 0) -> None:
        """OR in what another source found, its page 0 at `first_page`."""
        self.check_page_size(dirty)
        checked_range(first_page, dirty.npages, self.npages)
        for first, count in dirty.runs():
            mark_range(self.words, first_page + first, count)

    def fill(self) -> None:
        """Set every bit: initially-all-set."""
        mark_range(self.words, 0, self.npages)

    def is_dirty(self, page: int) -> bool:
        """Say whether a page's bit is set."""
        word, bit = divmod(checked_page(page, self.npages), WORD_PAGES)
        return bool(self.words[word] >> bit & 1)

    def count(self) -> int:
        """Count the dirty pages."""
        return popcount(self.words)

    def peek(self, first: int = 0, count: int | None = None) -> DirtyPages:
        """Copy the bits of a range and leave them; pages outside the range are clean in the copy."""
        copy = [0] * len(self.words)
        for number, mask in masks_of_range(*checked_range(first, count, self.npages)):
            copy[number] = self.words[number] & mask
        return DirtyPages(copy, self.npages, self.page_size)

    def harvest(self, first: int = 0, count: int | None = None) -> DirtyPages:
        """Take the bits of a range and clear them; page numbers stay the bitmap's own."""
        taken = [0] * len(self.words)
        for number, mask in masks_of_range(*checked_range(first, count, self.npages)):
            taken[number] = self.words[number] & mask
            self.words[number] &= ~mask
        return DirtyPages(taken, self.npages, self.page_size)

    def clear(self, dirty: DirtyPages) -> None:
        """Clear the bits that are set in `dirty`: and-not."""
        self.check_page_size(dirty)
        if dirty.npages != self.npages:
            raise ValueError(f"{dirty.npages} pages cannot be cleared from a bitmap of {self.npages} pages")
        for number, mask in enumerate(dirty.words):
            self.words[number] &= ~mask

    def clear_range(self, first: int, count: int) -> None:
        """Clear the bits of adjacent pages."""
        clear_range(self.words, *checked_range(first, count, self.npages))

    def check_page_size(self, dirty: DirtyPages) -> None:
        """Refuse pages of another size."""
        if dirty.page_size != self.page_size:
            raise ValueError(f"pages of {dirty.page_size} bytes are not the bitmap's pages of {self.page_size}")
