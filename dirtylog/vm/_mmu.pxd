# The model's C structures and functions (protect.h, _harvest.h, _mmu.h), for the one module that wraps them.
from libc.stdint cimport uint32_t, uint64_t

from dirtylog._bits.bitmap cimport dl_bitmap


cdef extern from "dirtylog/protect.h" nogil:
    const char *DL_ARCH_HOOKS_CAPSULE

    struct dl_arch_hooks:
        pass

    struct dl_page_table:
        uint64_t *ptes
        uint64_t *huge
        uint64_t npages


cdef extern from "vm/_harvest.h" nogil:
    struct dl_double_log:
        dl_bitmap marked
        uint64_t *snapshot
        uint64_t taken

    void dl_protect_words(const dl_arch_hooks *hooks, const dl_page_table *table, const uint64_t *numbers,
                          const uint64_t *masks, size_t count)
    uint64_t dl_harvest_take(dl_double_log *log, const dl_page_table *table, const dl_arch_hooks *hooks)
    void dl_snapshot_words(const dl_double_log *log, uint64_t *numbers, uint64_t *masks)
    void dl_snapshot_drop(dl_double_log *log, int put_back)
    void dl_log_copy(const dl_double_log *log, uint64_t *out)


cdef extern from "vm/_mmu.h" nogil:
    enum dl_dirtying:
        DL_BY_FAULT
        DL_BY_FILL
        DL_BY_VM_LOG
        DL_BY_SHADOW
        DL_BY_CHANGE_BIT
        DL_BY_STORAGE_KEY

    enum:
        DL_STORE_WORD
        DL_ADD_BYTE

    struct dl_lock:
        uint64_t owner

    struct dl_memslot:
        uint32_t id
        int logging
        uint64_t base_gfn
        uint64_t npages
        dl_page_table table
        dl_double_log log

    struct dl_slot_table:
        size_t count
        dl_memslot **slots

    struct dl_vcpu:
        uint32_t index
        uint64_t faults
        uint64_t flushes

    struct dl_mmu:
        dl_lock *slots_lock
        dl_lock *mmu_lock
        dl_lock *dirty_log_lock
        dl_slot_table *table
        dl_vcpu *vcpus
        uint32_t nvcpus
        unsigned page_shift
        int dirtying
        uint64_t flushes
        dl_arch_hooks hooks
        int pml
        int huge_split

    enum:
        DL_NO_HUGE_PAGES
        DL_SPLIT_EAGERLY
        DL_SPLIT_ON_WRITE

    struct dl_ring_mask:
        uint64_t slot
        uint64_t offset
        uint64_t mask

    struct dl_store:
        int kind
        uint64_t value

    const dl_arch_hooks dl_hooks_none
    const dl_arch_hooks dl_hooks_each
    const dl_arch_hooks dl_hooks_dirty_bits
    const dl_arch_hooks dl_hooks_range
    const dl_arch_hooks dl_hooks_range_vmid

    int dl_lock_init(dl_lock *lock)
    void dl_lock_destroy(dl_lock *lock)
    int dl_lock_acquire(dl_lock *lock)
    int dl_lock_release(dl_lock *lock)
    bint dl_lock_held(const dl_lock *lock)

    int dl_mmu_init(dl_mmu *mmu, uint32_t vcpus)
    void dl_mmu_destroy(dl_mmu *mmu)
    dl_memslot *dl_slot_of_id(const dl_mmu *mmu, uint32_t id)
    dl_memslot *dl_slot_new(const dl_mmu *mmu, uint32_t id, uint64_t base_gfn, uint64_t npages, unsigned char *host)
    void dl_slot_free(dl_memslot *slot)
    int dl_log_alloc(dl_memslot *slot)
    void dl_log_free(dl_memslot *slot)
    int dl_mmu_add(dl_mmu *mmu, dl_memslot *slot)
    int dl_mmu_remove(dl_mmu *mmu, dl_memslot *slot)
    int dl_mmu_move(dl_mmu *mmu, dl_memslot *slot, uint64_t base_gfn)
    int dl_sync(dl_mmu *mmu, dl_memslot *slot, int discard)
    int dl_mmu_harvest(dl_mmu *mmu, dl_memslot *slot, int protect)
    void dl_mmu_protect_region(dl_mmu *mmu, dl_memslot *slot)
    void dl_flush(dl_mmu *mmu)
    void dl_flush_generic(dl_mmu *mmu)
    void dl_flush_range(dl_mmu *mmu, uint64_t first_gfn, uint64_t count)
    void dl_flush_shadow(dl_mmu *mmu, dl_memslot *slot)
    size_t dl_vcpu_unbacked(dl_mmu *mmu, dl_vcpu *vcpu, const uint64_t *gfns, size_t n)
    int dl_vcpu_store(dl_mmu *mmu, dl_vcpu *vcpu, const uint64_t *gfns, size_t n, const dl_store *store, size_t *done)
    int dl_vcpu_write(dl_mmu *mmu, dl_vcpu *vcpu, uint64_t gpa, const unsigned char *data, uint64_t size,
                      uint64_t *written, uint64_t *bad_gfn)
    int dl_vcpu_read(dl_mmu *mmu, dl_vcpu *vcpu, uint64_t gpa, unsigned char *out, uint64_t size, uint64_t *bad_gfn)
    uint64_t dl_count_unguarded(const dl_memslot *slot)
    void dl_guest_enter(dl_vcpu *vcpu)
    void dl_guest_leave(dl_vcpu *vcpu)
    void dl_log_report(dl_double_log *log, uint64_t *out)
    bint dl_log_clear(dl_mmu *mmu, dl_memslot *slot, uint64_t first_word, uint64_t nwords, const uint64_t *words,
                      uint64_t *cleared, int protect)
    void dl_log_unclear(dl_memslot *slot, uint64_t first_word, uint64_t nwords, const uint64_t *cleared)
    void dl_log_fill(dl_memslot *slot)
    int dl_rings_init(dl_mmu *mmu, uint64_t size)
    size_t dl_rings_fetch(dl_mmu *mmu)
    void dl_rings_entries(const dl_mmu *mmu, uint64_t *slots, uint64_t *offsets)
    size_t dl_rings_masks(dl_mmu *mmu, dl_ring_mask *masks)
    int dl_rings_protect(dl_mmu *mmu, const dl_ring_mask *masks, size_t n)
    void dl_rings_forget(dl_mmu *mmu, uint32_t slot)
    void dl_rings_release(dl_mmu *mmu)
