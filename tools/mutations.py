"""The mutations that tools/mutate.py applies: each one a mistake that somebody could make."""

from dataclasses import dataclass

CORE = ("tests/core",)
WORDS = ("tests/core/test_words.py", "tests/core/test_pages.py", "tests/core/test_bitmap.py")
VM = ("tests/vm",)


@dataclass(frozen=True)
class Mutation:
    """One line changed.

    Attributes
    ----------
    name : str
        What is wrong afterwards.
    file : str
        Where.
    old, new : str
        The text, which occurs exactly once, and what it becomes.
    modules : tuple of str
        Extension modules to rebuild; empty for Python.
    tests : tuple of str
        What has to notice.
    """

    name: str
    file: str
    old: str
    new: str
    modules: tuple[str, ...]
    tests: tuple[str, ...]


def _core(name: str, old: str, new: str, file: str = "dirtylog/_core.pyx") -> Mutation:
    return Mutation(name, file, old, new, ("dirtylog._core",), CORE)


def _header(name: str, old: str, new: str) -> Mutation:
    return _core(name, old, new, "dirtylog/include/dirtylog/bitmap.h")


def _pages(name: str, old: str, new: str, file: str = "dirtylog/_pages.pyx") -> Mutation:
    return Mutation(name, file, old, new, ("dirtylog._pages",), CORE)


def _mmu(name: str, old: str, new: str, file: str = "dirtylog/vm/_mmu.h") -> Mutation:
    return Mutation(name, file, old, new, ("dirtylog.vm._mmu",), VM)


def _vm(name: str, file: str, old: str, new: str) -> Mutation:
    return Mutation(name, f"dirtylog/vm/{file}", old, new, (), VM)


MUTATIONS: tuple[Mutation, ...] = (
    # ---- include/dirtylog/bitmap.h: marks and harvests of words
    _header(
        "mark-is-a-plain-or",
        "    dl_fetch_or(&b->words[word], mask);\n    dl_summary_mark_word(b, word);\n}\n\nstatic inline void dl_mark(",
        "    b->words[word] |= mask;\n    dl_summary_mark_word(b, word);\n}\n\nstatic inline void dl_mark(",
    ),
    _header(
        "mark-skips-the-summary",
        "    dl_fetch_or(&b->words[word], mask);\n    dl_summary_mark_word(b, word);\n}\n\nstatic inline void dl_mark(",
        "    dl_fetch_or(&b->words[word], mask);\n}\n\nstatic inline void dl_mark(",
    ),
    _header("summary-is-never-marked-twice", "dl_fetch_or(&b->summary[group], lines);\n}\n\nstatic inline void dl_summary_mark_word",
            "dl_store_relaxed(&b->summary[group], lines);\n}\n\nstatic inline void dl_summary_mark_word"),
    _header("summary-tests-any-line", "& lines) != lines)\n        dl_fetch_or(&b->summary", "& lines) == 0)\n        dl_fetch_or(&b->summary"),
    _header("mask-part-one-page-short", "mask &= dl_mask_below((unsigned)(last - start) + 1);", "mask &= dl_mask_below((unsigned)(last - start));"),
    _header("mask-part-one-page-late", "mask &= dl_mask_from((unsigned)(first - start));", "mask &= dl_mask_from((unsigned)(first - start + 1));"),
    _header("range-forgets-its-last-word", "word <= last_word; word++) {\n        uint64_t mask", "word < last_word; word++) {\n        uint64_t mask"),
    _header("range-marks-one-line-of-the-summary", "    dl_summary_mark_words(b, first_word, last_word);\n}", "    dl_summary_mark_words(b, first_word, first_word);\n}"),
    _header("range-stores-partial-words-whole", "        if (mask == DL_ALL_PAGES)\n            dl_store_release", "        if (mask)\n            dl_store_release"),
    _header("batch-tests-any-bit", "if ((dl_load_relaxed(&b->words[word]) & mask) != mask)", "if (!(dl_load_relaxed(&b->words[word]) & mask))"),
    _header(
        "part-of-a-group-takes-all-of-it",
        "return mask == DL_ALL_PAGES ? dl_exchange(summary, 0) : dl_fetch_and(summary, ~mask) & mask;",
        "return dl_exchange(summary, 0) & mask;",
    ),
    _header("harvest-of-a-mask-clears-the-word", "dl_fetch_and(word, ~mask) & mask : 0;", "dl_exchange(word, 0) & mask : 0;"),
    # ---- _simd.c: the kernels
    _pages("harvest-copies-then-zeroes", "    return clear ? dl_exchange(word, 0) : dl_load_relaxed(word);",
           "    uint64_t was = dl_load_relaxed(word);\n    if (clear)\n        dl_store_relaxed(word, 0);\n    return was;", "dirtylog/_simd.c"),
    _pages("kernel-forgets-the-rest-of-a-line", "    for (unsigned i = 0; at + i < end; i++)\n        mask |=",
           "    for (unsigned i = 0; at + i + 1 < end; i++)\n        mask |=", "dirtylog/_simd.c"),
    _pages("empty-exchange-is-an-entry", "return count + (mask != 0);", "return count + 1;", "dirtylog/_simd.c"),
    _pages("page-numbers-past-the-capacity", "if (capacity - count < DL_WORD_PAGES)", "if (capacity - count < 1)", "dirtylog/_simd.c"),
    # ---- _core.pyx: checks and ranges
    _core("page-npages-is-accepted", "if number < 0 or <uint64_t>number >= self.bits.npages:", "if number < 0 or <uint64_t>number > self.bits.npages:"),
    _core("negative-pages-are-accepted", "if number < 0 or <uint64_t>number >= self.bits.npages:", "if number >= 0 and <uint64_t>number >= self.bits.npages:"),
    _core("range-past-the-end-is-accepted", "        if n > npages - start:\n", "        if n > npages:\n"),
    _core("batch-is-not-checked", "        if <uint64_t>pages[i] >= npages:\n            return i", "        if <uint64_t>pages[i] > npages:\n            return i"),
    _core("partial-line-is-taken-by-its-summary", "cdef uint64_t first_line = (first + line_pages - 1) // line_pages", "cdef uint64_t first_line = first // line_pages"),
    _core("harvest-leaves-out-the-tail", "                take_part(&sink, self.bits.words, tail_first, end)\n        finally:", "        finally:"),
    _core("harvest-leaves-out-the-head", "                take_part(&sink, self.bits.words, first, head_end)\n                take_lines", "                take_lines"),
    _core("peek-clears", "return self.take(start, end, None, False)", "return self.take(start, end, None, True)"),
    _core("clear-inverts-its-mask", "dl_fetch_and(bitmap.words + word, ~mask)", "dl_fetch_and(bitmap.words + word, mask)"),
    _core("merge-loses-what-crosses-a-word", "if shift and mask >> (64 - shift):", "if shift and mask >> (63 - shift) > 1 << 63:"),
    _core("foreign-tail-is-accepted", "if nwords and dl_load_relaxed(block.words + nwords - 1) & ~dl_tail_mask(npages):", "if nwords and False:"),
    _core("more-than-256-groups-are-lost", "                if ntaken < room:\n                    break", "                break"),
    _core("live-words-are-writable", "        if flags & PyBUF_WRITABLE:\n            raise BufferError(\"the live", "        if False:\n            raise BufferError(\"the live"),
    # ---- _pages.pyx: what is refused
    _pages("misaligned-memory-is-accepted", "if <size_t>view.buf % 8:", "if <size_t>view.buf % 4:"),
    _pages("read-only-memory-is-accepted", "    if writable and view.readonly:", "    if writable and view.readonly and view.len == 0:"),
    _pages("words-past-the-tail-are-accepted", "    if n and words[n - 1] & ~dl_tail_mask(npages):\n        raise ValueError(f\"the last", "    if n and words[n - 1] & ~dl_tail_mask(npages) and n > 1 << 40:\n        raise ValueError(f\"the last"),
    # ---- protect.h and vm/_mmu.h: protection, faults, flushes
    _mmu("each-protects-the-next-page", "dl_protect_page(table, first_page + dl_ffs(mask));", "dl_protect_page(table, first_page + dl_ffs(mask) + 1);", "dirtylog/include/dirtylog/protect.h"),
    _mmu("range-protects-all-but-the-last", "end = first_page + dl_fls(mask) + 1;", "end = first_page + dl_fls(mask);", "dirtylog/include/dirtylog/protect.h"),
    _mmu("harvest-protects-nothing", "                if (hooks)\n                    dl_protect_word(hooks, table, word, mask);", "", "dirtylog/include/dirtylog/protect.h"),
    _mmu("snapshot-replaces-what-was-left", "log->snapshot[word] |= mask;", "log->snapshot[word] = mask;", "dirtylog/include/dirtylog/protect.h"),
    _mmu("region-is-not-protected-to-its-end", "    for (uint64_t page = 0; page < table->npages; page++)\n        dl_protect_page(table, page);", "    for (uint64_t page = 0; page + 1 < table->npages; page++)\n        dl_protect_page(table, page);", "dirtylog/include/dirtylog/protect.h"),
    _mmu("fault-does-not-mark", "        else\n            dl_mark_page_dirty(slot, page);", "        else if (mmu->dirtying == DL_BY_STORAGE_KEY)\n            dl_mark_page_dirty(slot, page);"),
    _mmu("fault-takes-the-wrong-lock", "struct dl_lock *lock = mmu->dirtying == DL_BY_VM_LOG ? mmu->dirty_log_lock : mmu->mmu_lock;", "struct dl_lock *lock = mmu->dirty_log_lock;"),
    _mmu("tlb-is-not-emptied", "        for (unsigned i = 0; i < DL_TLB_ENTRIES; i++)\n            vcpu->tlb[i].tag = 0;\n        vcpu->flushes++;", "        vcpu->flushes++;"),
    _mmu("flush-does-not-wait", "        dl_fetch_or(&mmu->vcpus[i].requests, DL_REQUEST_TLB_FLUSH);\n    dl_kick_all(mmu);", "        dl_fetch_or(&mmu->vcpus[i].requests, DL_REQUEST_TLB_FLUSH);"),
    _mmu("old-generations-still-match", "entry->tag != gfn + 1 || entry->generation != generation", "entry->tag != gfn + 1"),
    _mmu("walk-ignores-protection", "return dl_load_acquire(pte) & DL_PTE_WRITABLE ? DL_STORED : DL_EXIT_FAULT;", "return dl_load_acquire(pte) & DL_PTE_PRESENT ? DL_STORED : DL_EXIT_FAULT;"),
    _mmu("range-flush-leaves-the-last-page", "for (uint64_t gfn = first_gfn; gfn < first_gfn + count; gfn++)", "for (uint64_t gfn = first_gfn + 1; gfn < first_gfn + count; gfn++)"),
    _mmu("last-gfn-of-a-slot-is-another-slot", "if (table->slots[middle]->base_gfn + table->slots[middle]->npages <= gfn)", "if (table->slots[middle]->base_gfn + table->slots[middle]->npages <= gfn + 1)"),
    _mmu("harvest-without-mmu-lock", "    int error = dl_lock_acquire(mmu->mmu_lock);\n    if (error)\n        return error;\n    dl_harvest_take", "    int error = 0;\n    if (error)\n        return error;\n    dl_harvest_take"),
    # ---- vm/*.py: order, locks and errnos
    _vm("flush-is-left-out", "mmu.py", "            if take(vm, slot):\n                vm.arch.flush_tlbs(vm, slot)", "            take(vm, slot)"),
    _vm("flush-comes-first", "mmu.py", "            if take(vm, slot):\n                vm.arch.flush_tlbs(vm, slot)", "            vm.arch.flush_tlbs(vm, slot)\n            take(vm, slot)"),
    _vm("failed-harvest-keeps-the-bits", "mmu.py", "            vm.mmu.put_back(slot)\n            raise", "            raise"),
    _vm("out-is-checked-too-late", "mmu.py", "elif view.nbytes != 8 * nwords:", "elif view.nbytes < 8 * nwords - 8:"),
    _vm("slots-may-overlap", "memslots.py", "other.base_gfn < end and region.base_gfn < other.base_gfn + other.npages", "other.base_gfn < end and region.base_gfn < other.base_gfn"),
    _vm("started-log-protects-nothing", "machine.py", "                self.arch.protect_region(self, slot)\n", "                pass\n"),
    _vm("started-log-is-not-flushed", "machine.py", "            self.arch.flush_tlbs(self, slot)\n", "            pass\n"),
)  # fmt: skip
