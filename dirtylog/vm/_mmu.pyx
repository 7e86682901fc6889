# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""The machine below the facade: locks, page tables, TLBs and the vCPUs' stores, without the GIL.

Methods that name a memslot require ``slots_lock`` to be held by the calling thread,
and say so when it is not: that is what keeps a slot from being freed under them.
"""

import errno
import os

import numpy as np

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from libc.errno cimport EFAULT, ENOMEM
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from dirtylog._bits.atomic cimport dl_load_relaxed
from dirtylog._bits.blocks cimport Block, block_new
from dirtylog._bits.pages cimport DirtyPages, pages_from_sparse_blocks, pages_from_words_block


cdef extern from "<errno.h>" nogil:
    const int EDEADLK
    const int ENOBUFS


__all__ = ["Lock", "Mmu"]

DIRTYING = {
    "fault": DL_BY_FAULT,
    "fill": DL_BY_FILL,
    "vm-log": DL_BY_VM_LOG,
    "shadow": DL_BY_SHADOW,
    "change-bit": DL_BY_CHANGE_BIT,
    "storage-key": DL_BY_STORAGE_KEY,
}

HUGE_PAGES = {None: DL_NO_HUGE_PAGES, "eager": DL_SPLIT_EAGERLY, "on-write": DL_SPLIT_ON_WRITE}


cdef object hooks_capsule(const dl_arch_hooks *hooks):
    return PyCapsule_New(<void *>hooks, DL_ARCH_HOOKS_CAPSULE, NULL)


NO_PROTECTION = hooks_capsule(&dl_hooks_none)
PROTECT_EACH = hooks_capsule(&dl_hooks_each)
PROTECT_DIRTY_BITS = hooks_capsule(&dl_hooks_dirty_bits)
PROTECT_RANGE = hooks_capsule(&dl_hooks_range)
PROTECT_RANGE_FLUSH_VMID = hooks_capsule(&dl_hooks_range_vmid)


cdef const dl_arch_hooks *hooks_of(object capsule) except NULL:
    return <const dl_arch_hooks *>PyCapsule_GetPointer(capsule, DL_ARCH_HOOKS_CAPSULE)


cdef object failed(int error, object what):
    """Make the exception for a negative errno; the caller raises it."""
    if error == -EDEADLK:
        return RuntimeError(f"{what}: this thread holds a lock that the operation must take; release it first")
    if error == -ENOMEM:
        return MemoryError(f"{what}: no memory for it")
    return OSError(-error, f"{what}: {os.strerror(-error)}")


@cython.final
cdef class Lock:
    """A lock of the machine that also excludes threads running without the GIL.

    A context manager. It is waited for without the GIL, so a thread may hold it
    and run Python. Taking it twice in one thread is a `RuntimeError`, never a
    hang.
    """

    cdef dl_lock *lock
    cdef readonly str name

    def __cinit__(self, str name):
        self.name = name
        self.lock = <dl_lock *>calloc(1, sizeof(dl_lock))
        if self.lock == NULL:
            raise MemoryError
        if dl_lock_init(self.lock):
            free(self.lock)
            self.lock = NULL
            raise MemoryError

    def __dealloc__(self):
        if self.lock != NULL:
            dl_lock_destroy(self.lock)
            free(self.lock)

    @property
    def held(self) -> bool:
        """Whether the calling thread holds it."""
        return dl_lock_held(self.lock)

    def __enter__(self) -> Lock:
        cdef int error
        with nogil:
            error = dl_lock_acquire(self.lock)
        if error:
            raise failed(error, self.name)
        return self

    def __exit__(self, *exception: object) -> None:
        if dl_lock_release(self.lock):
            raise RuntimeError(f"{self.name} is not held by this thread")

    def __repr__(self) -> str:
        return f"<{self.name}, {'held' if self.lock.owner else 'free'}>"


@cython.final
cdef class Mmu:
    """Memslots, page tables, TLBs and vCPUs of one machine.

    Parameters
    ----------
    vcpus : int
        Number of virtual CPUs.
    page_shift : int
        Page size in bytes is ``1 << page_shift``.
    dirtying : str
        How pages become dirty: a key of `DIRTYING`.
    hooks : PyCapsule
        ``struct dl_arch_hooks`` under the name ``dirtylog.arch_hooks.1``.
    dirty_ring : int
        Entries of each vCPU's dirty ring, 0 for none.
    huge_pages : str or None
        When logging splits 2 MiB mappings: a key of `HUGE_PAGES`.
    pml : bool
        Whether each vCPU keeps a page-modification log.

    Notes
    -----
    Every operation releases the GIL. ``slots_lock``, ``mmu_lock`` and
    ``dirty_log_lock`` are taken in this order.
    """

    cdef dl_mmu mmu
    cdef readonly Lock slots_lock
    cdef readonly Lock mmu_lock
    cdef readonly Lock dirty_log_lock
    cdef readonly object hooks
    cdef dict memories          # slot id -> the array a slot's pages live in

    def __cinit__(self, uint32_t vcpus, unsigned page_shift, str dirtying, object hooks, uint64_t dirty_ring=0,
                  object huge_pages=None, bint pml=False):
        memset(&self.mmu, 0, sizeof(dl_mmu))
        self.memories = {}
        self.hooks = hooks
        self.mmu.hooks = hooks_of(hooks)[0]
        self.mmu.page_shift = page_shift
        self.mmu.dirtying = DIRTYING[dirtying]
        self.mmu.huge_split = HUGE_PAGES[huge_pages]
        self.mmu.pml = pml
        self.slots_lock = Lock("slots_lock")
        self.mmu_lock = Lock("mmu_lock")
        self.dirty_log_lock = Lock("dirty_log_lock")
        self.mmu.slots_lock = self.slots_lock.lock
        self.mmu.mmu_lock = self.mmu_lock.lock
        self.mmu.dirty_log_lock = self.dirty_log_lock.lock
        if dl_mmu_init(&self.mmu, vcpus) or (dirty_ring and dl_rings_init(&self.mmu, dirty_ring)):
            raise MemoryError

    def __dealloc__(self):
        dl_mmu_destroy(&self.mmu)

    # ---- memslots ----------------------------------------------------------------

    cdef int check_slots_lock(self) except -1:
        if not dl_lock_held(self.mmu.slots_lock):
            raise RuntimeError("slots_lock is not held by this thread: use `with vm.slots_lock:`")
        return 0

    cdef dl_memslot *slot(self, uint32_t slot) except NULL:
        cdef dl_memslot *found
        self.check_slots_lock()
        found = dl_slot_of_id(&self.mmu, slot)
        if found == NULL:
            raise OSError(errno.ENOENT, f"slot {slot} does not exist; create it with set_memory_region()")
        return found

    cdef dl_memslot *logging_slot(self, uint32_t slot) except NULL:
        cdef dl_memslot *found = self.slot(slot)
        if not found.logging:
            raise OSError(errno.ENOENT, f"slot {slot} keeps no dirty log; set log_dirty=True in set_memory_region()")
        return found

    def slots(self) -> list[tuple[int, int, int, bool]]:
        """Return ``(id, base_gfn, npages, logging)`` of every slot, by gfn; under ``slots_lock``."""
        cdef size_t i
        self.check_slots_lock()
        return [(self.mmu.table.slots[i].id, self.mmu.table.slots[i].base_gfn, self.mmu.table.slots[i].npages,
                 bool(self.mmu.table.slots[i].logging)) for i in range(self.mmu.table.count)]

    def memory(self, uint32_t slot) -> np.ndarray:
        """Return the bytes of a slot's pages: the live memory, no copy."""
        self.slot(slot)
        return self.memories[slot]

    def add(self, uint32_t slot, uint64_t base_gfn, uint64_t npages, unsigned char[::1] memory, bint log,
            bint all_set=False):
        """Create a slot over `memory`, whose size the caller has checked."""
        cdef dl_memslot *fresh
        cdef int error
        self.check_slots_lock()
        array = np.asarray(memory)
        with nogil:
            fresh = dl_slot_new(&self.mmu, slot, base_gfn, npages, &memory[0])
            error = -ENOMEM if fresh == NULL else 0
            if not error and log:
                error = dl_log_alloc(fresh)
                fresh.logging = 1
                if all_set and not error:
                    dl_log_fill(fresh)
        if not error:
            # Before vCPUs see the slot, so that an interrupt leaves nothing dangling.
            self.memories[slot] = array
            with nogil:
                error = dl_mmu_add(&self.mmu, fresh)
        if error:
            dl_slot_free(fresh)
            self.memories.pop(slot, None)
            raise failed(error, f"slot {slot} of {npages} pages")

    def remove(self, uint32_t slot):
        """Delete a slot; when it returns, no vCPU uses its memory."""
        cdef dl_memslot *found = self.slot(slot)
        cdef int error
        with nogil:
            error = dl_mmu_remove(&self.mmu, found)
        if error:
            raise failed(error, f"slot {slot}")
        del self.memories[slot]

    def move(self, uint32_t slot, uint64_t base_gfn):
        """Give a slot another place; its log moves with it."""
        cdef dl_memslot *found = self.slot(slot)
        cdef int error
        with nogil:
            error = dl_mmu_move(&self.mmu, found, base_gfn)
        if error:
            raise failed(error, f"slot {slot}")

    def start_log(self, uint32_t slot, bint all_set=False, list started=None):
        """Switch a slot's log on; under ``mmu_lock``. Unless all pages are set, protection and flush follow.

        The first item of `started` becomes True, before any signal handler runs.
        """
        cdef dl_memslot *found = self.slot(slot)
        if not self.mmu_lock.held:
            raise RuntimeError("mmu_lock is not held by this thread: use `with vm.mmu_lock:`")
        if dl_log_alloc(found):
            raise MemoryError(f"slot {slot}: no memory for the log")
        if all_set:
            dl_log_fill(found)
        found.logging = 1
        if started is not None:
            started[0] = True

    def stop_log(self, uint32_t slot):
        """Switch a slot's log off and free it; under ``mmu_lock``."""
        cdef dl_memslot *found = self.logging_slot(slot)
        if not self.mmu_lock.held:
            raise RuntimeError("mmu_lock is not held by this thread: use `with vm.mmu_lock:`")
        found.logging = 0
        dl_log_free(found)

    # ---- the steps of a harvest ------------------------------------------------------

    def check_log(self, uint32_t slot) -> int:
        """Return the slot's number of pages, ENOENT unless it keeps a log."""
        return self.logging_slot(slot).npages

    def sync(self, uint32_t slot, bint discard=False):
        """Move what the hardware recorded into the slot's log, or forget it."""
        cdef dl_memslot *found = self.slot(slot) if discard else self.logging_slot(slot)
        cdef int error
        with nogil:
            error = dl_sync(&self.mmu, found, discard)
        if error:
            raise failed(error, f"slot {slot}")

    def harvest(self, uint32_t slot, bint protect=True) -> bool:
        """Take ``mmu_lock``, exchange every nonzero word into the second half and protect its pages.

        Returns whether anything was dirty. `hand_out` or `put_back` follows.
        """
        cdef dl_memslot *found = self.logging_slot(slot)
        cdef int error
        with nogil:
            error = dl_mmu_harvest(&self.mmu, found, protect)
        if error:
            raise failed(error, f"slot {slot}")
        return found.log.taken != 0

    def harvest_batch(self, uint32_t slot, object protect) -> bool:
        """Do as `harvest` does, for write protection written in Python.

        ``protect(numbers, masks)`` is called once, under ``mmu_lock``, with the
        word numbers and masks of the snapshot, and not when it is empty.
        """
        cdef dl_memslot *found = self.logging_slot(slot)
        with self.mmu_lock:
            # No fault can mark between here and the end of the block, so the
            # protection sees what the snapshot holds. A hook that fails leaves
            # the snapshot for put_back().
            self.harvest_locked(found)
            if found.log.taken:
                protect(*self.snapshot_arrays(found))
        return found.log.taken != 0

    cdef void harvest_locked(self, dl_memslot *slot) noexcept:
        with nogil:
            dl_harvest_take(&slot.log, &slot.table, NULL)

    cdef tuple snapshot_arrays(self, dl_memslot *slot):
        numbers = np.empty(slot.log.taken, np.uint64)
        masks = np.empty(slot.log.taken, np.uint64)
        cdef uint64_t[::1] to_numbers = numbers, to_masks = masks
        with nogil:
            dl_snapshot_words(&slot.log, &to_numbers[0], &to_masks[0])
        return numbers, masks

    def hand_out(self, uint32_t slot, uint64_t[::1] out=None) -> DirtyPages:
        """Copy the second half out and empty it: the last step, after the flush."""
        cdef dl_memslot *found = self.logging_slot(slot)
        cdef uint64_t page_size = <uint64_t>1 << self.mmu.page_shift
        cdef uint64_t taken = found.log.taken, nwords = (found.npages + 63) // 64, i
        cdef Block numbers, masks
        cdef DirtyPages pages
        if 2 * taken <= nwords:
            numbers = block_new(taken, False)
            masks = block_new(taken, False)
            with nogil:
                dl_snapshot_words(&found.log, numbers.words, masks.words)
            pages = pages_from_sparse_blocks(numbers, masks, taken, found.npages, page_size, True)
        else:
            numbers = block_new(nwords, False)
            with nogil:
                for i in range(nwords):
                    numbers.words[i] = found.log.snapshot[i]
            pages = pages_from_words_block(numbers, found.npages, page_size, True)
        if out is not None:
            with nogil:
                for i in range(nwords):
                    out[i] = found.log.snapshot[i]
        # I5: a signal handler that raises does so while the snapshot can be put back. From here on nothing fails.
        PyErr_CheckSignals()
        with nogil:
            dl_snapshot_drop(&found.log, False)
        return pages

    def put_back(self, uint32_t slot):
        """Mark again what was taken and not handed out (I5)."""
        cdef dl_memslot *found = self.logging_slot(slot)
        with nogil:
            dl_snapshot_drop(&found.log, True)

    def peek(self, uint32_t slot) -> DirtyPages:
        """Copy the first half; clears nothing."""
        cdef dl_memslot *found = self.logging_slot(slot)
        cdef uint64_t nwords = (found.npages + 63) // 64
        cdef Block words = block_new(nwords, False)
        with nogil:
            dl_log_copy(&found.log, words.words)
        return pages_from_words_block(words, found.npages, <uint64_t>1 << self.mmu.page_shift, True)

    # ---- manual protection ---------------------------------------------------------------

    def report(self, uint32_t slot) -> DirtyPages:
        """Copy the log out and clear nothing, but remember what was reported."""
        cdef dl_memslot *found = self.logging_slot(slot)
        cdef Block words = block_new((found.npages + 63) // 64, False)
        with nogil:
            dl_log_report(&found.log, words.words)
        return pages_from_words_block(words, found.npages, <uint64_t>1 << self.mmu.page_shift, True)

    def clear(self, uint32_t slot, uint64_t first_word, const uint64_t[::1] words, uint64_t[::1] cleared,
              object protect=None) -> bool:
        """Clear those of `words` that were reported and protect their pages; True if anything was cleared.

        What was cleared goes to `cleared`, as long as `words`, also when it
        fails: it is what `unclear` requires. ``protect(numbers, masks)`` takes the
        place of the C hook, under ``mmu_lock``.
        """
        cdef dl_memslot *found = self.logging_slot(slot)
        cdef uint64_t nwords = words.shape[0]
        cdef bint any_cleared, native = protect is None
        if first_word + nwords > (found.npages + 63) // 64:
            raise IndexError(f"words {first_word} to {first_word + nwords - 1} are out of range of slot {slot}")
        if <uint64_t>cleared.shape[0] != nwords:
            raise ValueError(f"cleared has {cleared.shape[0]} words, words has {nwords}; they go in pairs")
        if nwords == 0:
            return False
        with self.mmu_lock:
            with nogil:
                any_cleared = dl_log_clear(&self.mmu, found, first_word, nwords, &words[0], &cleared[0], native)
            if any_cleared and not native:
                try:
                    masks = np.asarray(cleared)
                    numbers = np.flatnonzero(masks)
                    protect((numbers + first_word).astype(np.uint64), masks[numbers])
                except BaseException:
                    # Before a fault can mark: they are writable with a clear bit (I1).
                    dl_log_unclear(found, first_word, nwords, &cleared[0])
                    raise
        return any_cleared

    def unclear(self, uint32_t slot, uint64_t first_word, const uint64_t[::1] words):
        """Mark again what `clear` has cleared, when it or the flush after it failed (I5)."""
        cdef dl_memslot *found = self.logging_slot(slot)
        cdef uint64_t nwords = words.shape[0]
        if first_word + nwords > (found.npages + 63) // 64:
            raise IndexError(f"words {first_word} to {first_word + nwords - 1} are out of range of slot {slot}")
        if nwords:
            with nogil:
                dl_log_unclear(found, first_word, nwords, &words[0])

    # ---- dirty rings -----------------------------------------------------------------------

    def ring_entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Fetch every ring; return slot ids and pages of all entries not released yet."""
        cdef size_t n
        self.check_slots_lock()
        with nogil:
            n = dl_rings_fetch(&self.mmu)
        slots, offsets = np.empty(n, np.uint64), np.empty(n, np.uint64)
        cdef uint64_t[::1] to_slots = slots, to_offsets = offsets
        if n:
            with nogil:
                dl_rings_entries(&self.mmu, &to_slots[0], &to_offsets[0])
        return slots, offsets

    def ring_masks(self, size_t entries) -> np.ndarray:
        """Return rows of slot, first page and mask: the fetched entries, neighbours coalesced."""
        cdef size_t n = 0
        self.check_slots_lock()
        masks = np.empty((entries, 3), np.uint64)
        cdef uint64_t[:, ::1] to_masks = masks
        if entries:
            with nogil:
                n = dl_rings_masks(&self.mmu, <dl_ring_mask *>&to_masks[0, 0])
        return masks[:n]

    def ring_protect(self, const uint64_t[:, ::1] masks):
        """Take ``mmu_lock`` and write-protect the pages of `ring_masks` with the C hook."""
        cdef size_t n = masks.shape[0]
        cdef int error = 0
        self.check_slots_lock()
        if masks.shape[1] != 3:
            raise ValueError(f"rows have {masks.shape[1]} numbers; they are slot, first page and mask")
        if n:
            with nogil:
                error = dl_rings_protect(&self.mmu, <const dl_ring_mask *>&masks[0, 0], n)
        if error:
            raise failed(error, "reset of the dirty rings")

    def ring_forget(self, uint32_t slot):
        """Drop what the rings hold of a slot that is gone, or keeps no log."""
        self.check_slots_lock()
        with nogil:
            dl_rings_forget(&self.mmu, slot)

    def ring_release(self):
        """Make room: the entries' pages are protected, the TLBs flushed."""
        self.check_slots_lock()
        with nogil:
            dl_rings_release(&self.mmu)

    def unguarded(self, uint32_t slot) -> int:
        """Count pages that are writable with a clear bit: 0 whenever ``mmu_lock`` is free (I1).

        For machines that log by write faults into bitmaps. Takes ``mmu_lock``.
        """
        cdef dl_memslot *found = self.logging_slot(slot)
        cdef uint64_t count
        with self.mmu_lock:
            with nogil:
                count = dl_count_unguarded(found)
        return count

    def huge_mappings(self, uint32_t slot) -> int:
        """Return how many 2 MiB mappings a slot has now."""
        cdef dl_memslot *found = self.slot(slot)
        cdef uint64_t group
        if found.table.huge == NULL:
            return 0
        return sum([found.table.huge[group] != 0 for group in range(found.npages // 512)])

    # ---- write protection and flushes ---------------------------------------------------

    def protect(self, uint32_t slot, const uint64_t[::1] numbers, const uint64_t[::1] masks, object hooks=None):
        """Write-protect pages given as word numbers and masks, in the form of `hooks`.

        Takes no lock: a hook calls it under ``mmu_lock``.
        """
        cdef dl_memslot *found = self.slot(slot)
        cdef const dl_arch_hooks *table = hooks_of(self.hooks if hooks is None else hooks)
        cdef uint64_t nwords = (found.npages + 63) // 64
        cdef size_t n = numbers.shape[0], i
        if n != <size_t>masks.shape[0]:
            raise ValueError(f"{numbers.shape[0]} word numbers and {masks.shape[0]} masks; they go in pairs")
        for i in range(n):
            if numbers[i] >= nwords:
                raise IndexError(f"word {numbers[i]} is out of range: slot {slot} has {nwords} words")
        if n:
            with nogil:
                dl_protect_words(table, &found.table, &numbers[0], &masks[0], n)

    def protect_region(self, uint32_t slot):
        """Write-protect every page of a slot; a hook calls it under ``mmu_lock``."""
        cdef dl_memslot *found = self.slot(slot)
        with nogil:
            dl_mmu_protect_region(&self.mmu, found)

    def flush(self):
        """Flush every vCPU's TLB as the hook table says."""
        with nogil:
            dl_flush(&self.mmu)

    def flush_slot(self, uint32_t slot):
        """Flush what the vCPUs' TLBs hold of one slot."""
        cdef dl_memslot *found = self.slot(slot)
        with nogil:
            dl_flush_range(&self.mmu, found.base_gfn, found.npages)

    def flush_shadow(self, uint32_t slot):
        """Flush every vCPU's own page-table entries of one slot."""
        cdef dl_memslot *found = self.slot(slot)
        if self.mmu.dirtying != DL_BY_SHADOW:
            raise ValueError("vCPUs have page tables of their own only where dirtying is 'shadow'")
        with nogil:
            dl_flush_shadow(&self.mmu, found)

    @property
    def flushes(self) -> int:
        """How many flushes of any kind there were."""
        return self.mmu.flushes

    # ---- vCPUs ----------------------------------------------------------------------------

    cdef dl_vcpu *vcpu(self, uint32_t vcpu) except NULL:
        if vcpu >= self.mmu.nvcpus:
            raise IndexError(f"vCPU {vcpu} is out of range: the machine has {self.mmu.nvcpus}")
        return &self.mmu.vcpus[vcpu]

    def guest_mode(self, uint32_t vcpu) -> GuestMode:
        """Keep a vCPU in guest mode for the length of a ``with`` block, as one long store does."""
        self.vcpu(vcpu)
        return GuestMode(self, vcpu)

    def faults(self, uint32_t vcpu) -> int:
        """How many of its stores left guest mode to be marked."""
        return dl_load_relaxed(&self.vcpu(vcpu).faults)

    def store(self, uint32_t vcpu, const uint64_t[::1] gfns, object value=None) -> int:
        """Add 1 to each page's first byte or, with a value, store it as each page's first word.

        Returns the number of pages; fewer than given when the vCPU's dirty ring is full.
        """
        cdef dl_vcpu *cpu = self.vcpu(vcpu)
        cdef dl_store store
        cdef size_t n = gfns.shape[0], done = 0, backed = 0
        cdef int error = 0
        if n == 0:
            return 0
        memset(&store, 0, sizeof(store))
        store.kind = DL_ADD_BYTE
        if value is not None:
            store.kind = DL_STORE_WORD
            store.value = value
        with nogil:
            backed = dl_vcpu_unbacked(&self.mmu, cpu, &gfns[0], n)
            if backed == n:
                error = dl_vcpu_store(&self.mmu, cpu, &gfns[0], n, &store, &done)
        if backed < n:
            raise unbacked(gfns[backed])
        if error == -EFAULT:
            raise unbacked(gfns[done])
        if error and error != -ENOBUFS:
            raise failed(error, f"vCPU {vcpu}, gfn {gfns[done]:#x}")
        return done

    def write(self, uint32_t vcpu, uint64_t gpa, const unsigned char[::1] data) -> int:
        """Store bytes at a guest-physical address; return how many, fewer when the dirty ring is full."""
        cdef dl_vcpu *cpu = self.vcpu(vcpu)
        cdef uint64_t size = data.shape[0], written = 0, bad_gfn = 0
        cdef int error
        if size == 0:
            return 0
        with nogil:
            error = dl_vcpu_write(&self.mmu, cpu, gpa, &data[0], size, &written, &bad_gfn)
        if error == -EFAULT:
            raise unbacked(bad_gfn)
        if error and error != -ENOBUFS:
            raise failed(error, f"vCPU {vcpu}, gfn {bad_gfn:#x}")
        return written

    def read(self, uint32_t vcpu, uint64_t gpa, size_t size) -> bytes:
        """Load bytes from a guest-physical address."""
        cdef dl_vcpu *cpu = self.vcpu(vcpu)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, size)
        cdef unsigned char *out = <unsigned char *>PyBytes_AS_STRING(data)
        cdef uint64_t bad_gfn = 0
        cdef int error
        with nogil:
            error = dl_vcpu_read(&self.mmu, cpu, gpa, out, size, &bad_gfn)
        if error:
            raise unbacked(bad_gfn)
        return data


@cython.final
cdef class GuestMode:
    """A stay of one vCPU in guest mode; a flush waits for its end.

    The thread inside must not use this vCPU, fault, or flush: it would wait for itself.
    """

    cdef Mmu owner
    cdef uint32_t index
    cdef bint inside

    def __cinit__(self, Mmu owner, uint32_t index):
        self.owner = owner
        self.index = index

    def __enter__(self) -> GuestMode:
        cdef dl_vcpu *vcpu = self.owner.vcpu(self.index)
        with nogil:
            dl_guest_enter(vcpu)
        self.inside = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self.inside:
            self.inside = False
            dl_guest_leave(self.owner.vcpu(self.index))


cdef object unbacked(uint64_t gfn):
    return OSError(errno.EFAULT, f"no memslot backs gfn {gfn:#x}; create one with set_memory_region()")
