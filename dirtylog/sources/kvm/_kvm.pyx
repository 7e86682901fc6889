# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: auto_pickle=False, autotestdict=False, freethreading_compatible=True, embedsignature=True
"""KVM's descriptors: ioctls and the drain of the dirty rings without the GIL, memory that stays where it is."""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EBUSY, EINTR, EIO, ENOENT, errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close

from dirtylog._bits.atomic cimport dl_fetch_add, dl_load_acquire
from dirtylog._bits.bitmap cimport dl_bitmap
from dirtylog._bits.blocks cimport Block, block_new
from dirtylog._bits.owed cimport Owed
from dirtylog._bits.pages cimport DirtyPages, pages_bare, pages_fill
from dirtylog._core cimport DirtyBitmap

import os

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_atfork(void (*prepare)(), void (*parent)(), void (*child)())

cdef extern from "sources/kvm/_kvm.h" nogil:
    struct dl_gate:
        pass
    struct dl_runner:
        uint64_t exits
    struct dl_ring_entry:
        pass
    struct dl_ring:
        dl_ring_entry *entries
        uint32_t size
        uint32_t fetch
        int full
    struct dl_ring_slot:
        const dl_bitmap *bits
        uint32_t id
    struct dl_ring_result:
        uint64_t drained
        uint64_t foreign
        uint64_t bad_offset
        uint32_t bad_slot
        int overflow
    struct dl_kvm_region:
        pass
    struct dl_kvm_enable:
        pass
    const unsigned long DL_KVM_GET_API_VERSION, DL_KVM_CREATE_VM, DL_KVM_CHECK_EXTENSION
    const unsigned long DL_KVM_GET_VCPU_MMAP_SIZE, DL_KVM_CREATE_VCPU, DL_KVM_SET_USER_MEMORY_REGION
    const unsigned long DL_KVM_GET_REGS, DL_KVM_SET_REGS, DL_KVM_GET_SREGS, DL_KVM_SET_SREGS, DL_KVM_ENABLE_CAP
    const int DL_KVM_DIRTY_LOG_PAGE_OFFSET, DL_RUN_AGAIN
    int dl_ioctl(int fd, unsigned long request, uintptr_t argument)
    int dl_kvm_get_dirty_log(int fd, uint32_t slot, uint64_t *words)
    int dl_kvm_clear_dirty_log(int fd, uint32_t slot, uint64_t first, uint32_t count, const uint64_t *words)
    int dl_kvm_reset_rings(int fd, uint64_t expected, uint64_t *reset)
    void dl_gate_init(dl_gate *gate)
    int dl_gate_enter(dl_gate *gate)
    void dl_gate_leave(dl_gate *gate)
    int dl_gate_shut(dl_gate *gate)
    void dl_gate_drain(dl_gate *gate)
    void dl_gate_destroy(dl_gate *gate)
    void dl_runner_init(dl_runner *runner)
    void dl_runner_destroy(dl_runner *runner)
    int dl_kick_signal()
    void dl_kick(dl_runner *runner, uint8_t *run, int number)
    uint64_t dl_left_ask(dl_runner *runner, uint8_t *run, int number)
    void dl_left_wait(dl_runner *runner, uint64_t exits)
    int dl_run(int fd, dl_runner *runner, uint8_t *run, int number)
    dl_ring_result dl_ring_drain(dl_ring *ring, dl_ring_slot *slots, size_t nslots)
    uint64_t dl_words_for(uint64_t npages)
    int dl_gate_is_shut(dl_gate *gate)
    int dl_gate_inherited(const dl_gate *gate)
    void dl_born()

GET_API_VERSION = DL_KVM_GET_API_VERSION
CREATE_VM = DL_KVM_CREATE_VM
CHECK_EXTENSION = DL_KVM_CHECK_EXTENSION
GET_VCPU_MMAP_SIZE = DL_KVM_GET_VCPU_MMAP_SIZE
CREATE_VCPU = DL_KVM_CREATE_VCPU
SET_USER_MEMORY_REGION = DL_KVM_SET_USER_MEMORY_REGION
GET_REGS = DL_KVM_GET_REGS
SET_REGS = DL_KVM_SET_REGS
GET_SREGS = DL_KVM_GET_SREGS
SET_SREGS = DL_KVM_SET_SREGS
ENABLE_CAP = DL_KVM_ENABLE_CAP

cdef int kick_number = 0

pthread_atfork(NULL, NULL, dl_born)


cdef int fail(int result, str what) except -1:
    raise OSError(-result, f"{what}: {os.strerror(-result)}")


@cython.final
cdef class Pinned:
    """Memory lent to the kernel: the owner cannot free, resize or unmap it before `release`.

    Parameters
    ----------
    memory : buffer
        Writable and contiguous.

    Raises
    ------
    TypeError
        The object has no buffer.
    BufferError, ValueError
        The buffer is read-only or has gaps.
    """

    cdef Py_buffer view
    cdef bint held
    # The slot was deleted; under the `layout` lock of its VM.
    cdef bint gone

    def __cinit__(self, object memory):
        PyObject_GetBuffer(memory, &self.view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    @property
    def address(self) -> int:
        """Where the memory starts."""
        return <uintptr_t>self.view.buf if self.held else 0

    @property
    def nbytes(self) -> int:
        """Size in bytes; 0 after release."""
        return self.view.len if self.held else 0

    def release(self) -> None:
        """Give the memory back to its owner."""
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)


cdef class Handle:
    """A KVM descriptor: closed once, and never under a call that uses it.

    Parameters
    ----------
    fd : int or list
        Taken over. The first item of a list is not: it is duplicated, before any signal handler runs.
    name : str
        For messages: ``"VM"``, ``"vCPU 0"``.

    Notes
    -----
    Any method from any thread. A descriptor's number may belong to another
    file as soon as it is closed: `close` waits until the calls under way have
    left, and later calls raise ValueError.
    """

    cdef dl_gate gate
    # Held by whoever deletes a slot, and by whoever has words for its pages written:
    # another slot of that number may be larger than the words.
    cdef pthread_mutex_t layout
    cdef int fd
    # Arguments of a wrong type are refused before the first line of `__cinit__`, and 0 is somebody's descriptor.
    cdef bint owns
    cdef readonly str name

    def __cinit__(self, object fd, str name, *args):
        dl_gate_init(&self.gate)
        pthread_mutex_init(&self.layout, NULL)
        self.fd = -1
        self.owns = True
        self.fd = os.dup(fd[0]) if isinstance(fd, list) else fd
        self.name = name

    def __dealloc__(self):
        if self.owns and self.fd >= 0:
            close(self.fd)
        pthread_mutex_destroy(&self.layout)
        dl_gate_destroy(&self.gate)

    cdef int enter(self) except -1:
        if dl_gate_inherited(&self.gate):
            raise OSError(EIO, f"{self.name} belongs to the process that this one was forked from; make a new machine")
        if not dl_gate_enter(&self.gate):
            raise ValueError(f"{self.name} is closed; open a new one")
        return 0

    cdef void interrupt(self) noexcept:
        pass

    cdef void unmap(self) noexcept:
        pass

    @property
    def inherited(self) -> bool:
        """Whether it was made by the process that this one was forked from."""
        return bool(dl_gate_inherited(&self.gate))

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.fd < 0 if self.inherited else bool(dl_gate_is_shut(&self.gate))

    def fileno(self) -> int:
        """Return the descriptor; ValueError once closed."""
        if self.closed:
            raise ValueError(f"{self.name} is closed; open a new one")
        return self.fd

    def close(self) -> None:
        """Close the descriptor when the calls under way have left; the second time does nothing."""
        if self.inherited:
            # Whoever is in a call, or holds a lock, is in the other process.
            if self.fd < 0:
                return
        elif not dl_gate_shut(&self.gate):
            return
        else:
            self.interrupt()
            with nogil:
                dl_gate_drain(&self.gate)
        self.unmap()
        close(self.fd)
        self.fd = -1

    def ioctl(self, unsigned long request, argument, str what, Pinned ending=None, dict forget=None, key=None,
              list record=None, value=None) -> int:
        """Call ioctl without the GIL.

        Parameters
        ----------
        request : int
            One of this module's numbers.
        argument : int or writable buffer
            The third argument: itself, or the address of the buffer.
        what : str
            Names the call in the error: ``"KVM_CREATE_VCPU"``.
        ending : Pinned, optional
            The memory of a slot that this call deletes: `get_dirty_log` refuses it from then on.
        forget, key : dict and its key, optional
            Removed once the kernel has done it, before any signal handler runs: what the kernel has
            deleted is known to nobody any more.
        record : list, optional
            Its first item becomes `value`, or the kernel's answer where that is None, before any signal handler
            runs: what the kernel has changed is known here.

        Returns
        -------
        int
            What the kernel answered.

        Raises
        ------
        OSError
            With the kernel's errno. A call interrupted by a signal is repeated
            after Python's handlers have run, as everywhere in Python.
        """
        cdef Pinned pinned = None
        cdef uintptr_t plain
        cdef int result
        if isinstance(argument, int):
            plain = argument
        else:
            pinned = Pinned(argument)
            plain = <uintptr_t>pinned.view.buf
        while True:
            self.enter()
            with nogil:
                if ending is not None:
                    pthread_mutex_lock(&self.layout)
                result = dl_ioctl(self.fd, request, plain)
                if ending is not None:
                    ending.gone = ending.gone or result >= 0
                    pthread_mutex_unlock(&self.layout)
                dl_gate_leave(&self.gate)
            if result >= 0:
                if record is not None:
                    record[0] = result if value is None else value
                if forget is not None:
                    forget.pop(key, None)
                return result
            if result != -EINTR:
                fail(result, what)
            PyErr_CheckSignals()

    def get_dirty_log(self, uint32_t slot, Pinned memory not None, uint64_t npages, uint64_t page_size,
                      Owed owed=None, bint keep=False) -> DirtyPages:
        """KVM_GET_DIRTY_LOG of a slot of `npages` on `memory`; OSError with the kernel's errno and the slot.

        With `owed` the answer has what is owed, and is owed if it cannot be handed out; `keep` it owed in any case.
        """
        # I5: the words, and the answer, exist before the kernel clears the first bit.
        cdef Block block = block_new(dl_words_for(npages), False)
        cdef DirtyPages pages = pages_bare(npages, page_size, True)
        cdef int result
        if owed is not None:
            owed.check(pages)
        self.enter()
        with nogil:
            pthread_mutex_lock(&self.layout)
            result = -ENOENT if memory.gone else dl_kvm_get_dirty_log(self.fd, slot, block.words)
        # Nothing from here to the mutex's release fails or calls Python. It is held until a peek has owed what
        # it took: whoever asks the kernel next finds it there.
        if result >= 0:
            pages_fill(pages, block, None, None, 0)
            if keep and owed is not None:
                owed.note(pages, 0)
        pthread_mutex_unlock(&self.layout)
        dl_gate_leave(&self.gate)
        if result < 0:
            fail(result, f"KVM_GET_DIRTY_LOG of slot {slot}")
        if owed is None:
            return pages
        return owed.peek(pages) if keep else owed.hand_out(pages)

    def clear_dirty_log(
        self, uint32_t slot, uint64_t first_page, uint32_t num_pages, const uint64_t[::1] words, list cleared=None
    ) -> None:
        """KVM_CLEAR_DIRTY_LOG; `words` start at the slot's first page and cover the range.

        The first item of `cleared` becomes True when the kernel has cleared them, before any signal handler runs.
        """
        cdef int result
        cdef uint64_t first_word = first_page // 64
        cdef const uint64_t *start = NULL
        # The kernel refuses a range outside the slot before it reads the words,
        # and a range inside is covered by them: see the caller.
        if first_word < <uint64_t>words.shape[0]:
            start = &words[first_word]
        self.enter()
        with nogil:
            result = dl_kvm_clear_dirty_log(self.fd, slot, first_page, num_pages, start)
            dl_gate_leave(&self.gate)
        if cleared is not None and result >= 0:
            cleared[0] = True
        if result < 0:
            fail(result, f"KVM_CLEAR_DIRTY_LOG of slot {slot}, {num_pages} pages from {first_page}")

    def reset_rings(self, uint64_t expected) -> int:
        """KVM_RESET_DIRTY_RINGS until `expected` entries are taken back or nothing moves any more."""
        cdef uint64_t reset = 0
        cdef int result
        self.enter()
        result = self.reset(expected, &reset)
        dl_gate_leave(&self.gate)
        if result < 0:
            fail(result, "KVM_RESET_DIRTY_RINGS")
        return reset

    cdef int reset(self, uint64_t expected, uint64_t *reset) noexcept:
        cdef int result
        with nogil:
            result = dl_kvm_reset_rings(self.fd, expected, reset)
        return result


@cython.final
cdef class VcpuHandle(Handle):
    """A vCPU's descriptor with its run page mapped.

    Parameters
    ----------
    fd : int or list
        As for `Handle`; taken over even when mapping it fails.
    name : str
        For messages.
    run_size : int
        What KVM_GET_VCPU_MMAP_SIZE answered, in bytes.
    """

    cdef dl_runner runner
    cdef uint8_t *page
    cdef size_t run_size
    # Whether `run` ends, rather than goes on, when a harvest has made the guest leave.
    cdef public bint paced

    def __cinit__(self, object fd, str name, size_t run_size):
        global kick_number
        cdef void *page
        dl_runner_init(&self.runner)
        self.run_size = run_size
        if kick_number == 0:
            kick_number = dl_kick_signal()
            if kick_number == 0:
                raise OSError(EBUSY, "no real-time signal is free: a vCPU needs one to be interrupted")
        page = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, 0)
        if page == MAP_FAILED:
            fail(-errno, f"mapping the run page of {name}")
        self.page = <uint8_t *>page

    def __dealloc__(self):
        self.unmap()
        dl_runner_destroy(&self.runner)

    cdef void interrupt(self) noexcept:
        dl_kick(&self.runner, self.page, kick_number)

    cdef void unmap(self) noexcept:
        if self.page != NULL:
            munmap(self.page, self.run_size)
            self.page = NULL

    def run(self, list left=None) -> bool | None:
        """KVM_RUN without the GIL: True when the guest left, False when a signal or a kick ended it.

        None, where it is `paced`: a harvest made it leave, and it is to be run on.

        Parameters
        ----------
        left : list, optional
            Its first item becomes True when the guest left, before any signal handler runs.

        Raises
        ------
        RuntimeError
            The vCPU is running in another thread.
        OSError
            With the kernel's errno.
        KeyboardInterrupt, or whatever Python's signal handler raises
            The guest can be run on.
        """
        cdef int result
        self.enter()
        while True:
            with nogil:
                result = dl_run(self.fd, &self.runner, self.page, kick_number)
                dl_gate_leave(&self.gate)
            if result != DL_RUN_AGAIN:
                break
            # A harvest made it leave. A signal may have come with it: its handler runs here, and if it raises, the
            # run ends as it would have.
            PyErr_CheckSignals()
            if self.paced:
                return None
            if self.inherited:
                self.enter()
            elif not dl_gate_enter(&self.gate):
                # Closed meanwhile, which ends a run under way like a kick.
                return False
        if result == -EINTR:
            PyErr_CheckSignals()
            return False
        if result == -EBUSY:
            raise RuntimeError(f"{self.name} is running in another thread; kick() it first")
        if result < 0:
            fail(result, f"KVM_RUN of {self.name}")
        if left is not None:
            left[0] = True
        return True

    @property
    def exits(self) -> int:
        """How often KVM_RUN has returned."""
        return self.runner.exits

    def kick(self) -> None:
        """Make the run under way return, or the next one if there is none."""
        self.enter()
        with nogil:
            dl_kick(&self.runner, self.page, kick_number)
            dl_gate_leave(&self.gate)

    def load(self, size_t offset, size_t size) -> bytes:
        """Copy bytes out of the run page; IndexError outside it."""
        if offset > self.run_size or size > self.run_size - offset:
            raise IndexError(f"{size} bytes at {offset} are outside the run page of {self.run_size} bytes")
        self.enter()
        try:
            return PyBytes_FromStringAndSize(<char *>self.page + offset, <Py_ssize_t>size)
        finally:
            dl_gate_leave(&self.gate)

    def store(self, size_t offset, const uint8_t[::1] data) -> None:
        """Copy bytes into the run page; IndexError outside it."""
        cdef size_t size = <size_t>data.shape[0]
        if offset > self.run_size or size > self.run_size - offset:
            raise IndexError(f"{size} bytes at {offset} are outside the run page of {self.run_size} bytes")
        self.enter()
        if size:
            memcpy(self.page + offset, &data[0], size)
        dl_gate_leave(&self.gate)


def leave_guest(list vcpus not None) -> None:
    """Make every vCPU that is in KVM_RUN leave it once, and wait, without the GIL, until each has.

    Their runs go on by themselves. A vCPU that is not running has left already.

    Parameters
    ----------
    vcpus : list of VcpuHandle

    Raises
    ------
    OSError
        EIO in the child of a fork, where the threads that run them are not.

    References
    ----------
    ``KVM_CAP_DIRTY_LOG_RING`` in Linux ``Documentation/virt/kvm/api.rst``.
    """
    cdef VcpuHandle vcpu
    cdef list exits = []
    cdef uint64_t before
    for vcpu in vcpus:
        if vcpu.inherited:
            vcpu.enter()
        # All are asked before the first is waited for: they leave at the same time.
        if dl_gate_enter(&vcpu.gate):
            before = dl_left_ask(&vcpu.runner, vcpu.page, kick_number)
            dl_gate_leave(&vcpu.gate)
        else:
            before = dl_left_ask(&vcpu.runner, NULL, kick_number)
        exits.append(before)
    for vcpu, before in zip(vcpus, exits, strict=True):
        with nogil:
            dl_left_wait(&vcpu.runner, before)


@cython.final
cdef class Ring:
    """The dirty ring of one vCPU, or 16-byte entries in any memory that behaves like one.

    Parameters
    ----------
    memory : writable buffer, or VcpuHandle
        The entries: u32 flags, u32 slot, u64 offset; or the vCPU whose ring is mapped.
    entries : int
        A power of two.
    """

    cdef dl_ring ring
    cdef Pinned pinned
    cdef void *mapped
    # Entries that were read, from the beginning.
    cdef readonly uint64_t taken

    def __cinit__(self, object memory, uint32_t entries):
        cdef size_t size = <size_t>entries * 16
        cdef VcpuHandle vcpu
        cdef void *page
        if entries == 0 or entries & (entries - 1):
            raise ValueError(f"a ring has a power of two of entries, not {entries}")
        self.ring.size = entries
        if isinstance(memory, VcpuHandle):
            vcpu = memory
            vcpu.enter()
            page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu.fd,
                        DL_KVM_DIRTY_LOG_PAGE_OFFSET * os.sysconf("SC_PAGESIZE"))
            dl_gate_leave(&vcpu.gate)
            if page == MAP_FAILED:
                fail(-errno, f"mapping the dirty ring of {vcpu.name}, {entries} entries")
            self.mapped = page
            self.ring.entries = <dl_ring_entry *>page
            return
        self.pinned = Pinned(memory)
        if <size_t>self.pinned.view.len < size or <uintptr_t>self.pinned.view.buf % 16:
            raise ValueError(f"{entries} entries need {size} bytes on a 16-byte boundary")
        self.ring.entries = <dl_ring_entry *>self.pinned.view.buf

    def __dealloc__(self):
        self.unmap()

    cdef void unmap(self) noexcept:
        if self.mapped != NULL:
            munmap(self.mapped, <size_t>self.ring.size * 16)
            self.mapped = NULL

    def close(self) -> None:
        """Let go of the entries: a later drain is a ValueError. Under the VM's harvest lock."""
        self.unmap()
        self.pinned = None
        self.ring.entries = NULL

    def mark_full(self) -> None:
        """Note that KVM called the ring full and nobody has harvested since."""
        self.ring.full = 1

    @property
    def entries(self) -> int:
        """Capacity in pages."""
        return self.ring.size


@cython.final
cdef class RingLog:
    """The slots that the rings of one VM name: for each a bitmap that a drain marks.

    Notes
    -----
    The VM's harvest lock is held around every call: a ring has one reader. The bitmaps may be harvested and
    marked by anybody at any time.
    """

    cdef dl_ring_slot *slots
    cdef size_t nslots
    # DirtyBitmap, in the order of `slots`, which points into them.
    cdef list bitmaps
    # Entries that we marked for reset and KVM has not taken back.
    cdef readonly uint64_t outstanding
    # Calls of `drain_and_reset` that have ended.
    cdef uint64_t ended
    # What `drain_and_reset` has found wrong; nothing but `RingLog` itself forgets it.
    cdef readonly int overflowed
    cdef readonly uint64_t expected, taken_back
    cdef dl_ring_result foreign_entry
    cdef int foreign_ring

    def __cinit__(self):
        self.bitmaps = []
        self.overflowed = self.foreign_ring = -1

    def __dealloc__(self):
        free(self.slots)

    def __contains__(self, uint32_t slot) -> bool:
        cdef size_t i
        for i in range(self.nslots):
            if self.slots[i].id == slot:
                return True
        return False

    cdef Py_ssize_t find(self, uint32_t slot) except -1:
        cdef size_t i
        for i in range(self.nslots):
            if self.slots[i].id == slot:
                return <Py_ssize_t>i
        raise KeyError(slot)

    def __getitem__(self, uint32_t slot) -> DirtyBitmap:
        """Return a slot's bitmap; KeyError when unknown."""
        return self.bitmaps[self.find(slot)]

    def add(self, uint32_t slot, DirtyBitmap bitmap not None) -> None:
        """Begin to mark the pages of a slot in `bitmap`; ValueError when it is known already."""
        if slot in self:
            raise ValueError(f"slot {slot} is known already; remove it first")
        cdef dl_ring_slot *grown = <dl_ring_slot *>realloc(self.slots, (self.nslots + 1) * sizeof(dl_ring_slot))
        cdef size_t place = 0
        if grown == NULL:
            raise MemoryError()
        self.slots = grown
        while place < self.nslots and grown[place].id < slot:
            place += 1
        self.bitmaps.insert(place, bitmap)
        memmove(&grown[place + 1], &grown[place], (self.nslots - place) * sizeof(dl_ring_slot))
        grown[place] = dl_ring_slot(bits=&bitmap.bits, id=slot)
        self.nslots += 1

    def remove(self, uint32_t slot) -> None:
        """Mark the pages of a slot no longer; KeyError when unknown."""
        cdef size_t place = <size_t>self.find(slot)
        self.nslots -= 1
        memmove(&self.slots[place], &self.slots[place + 1], (self.nslots - place) * sizeof(dl_ring_slot))
        del self.bitmaps[place]

    def drain(self, Ring ring) -> tuple[int, bool, tuple[int, int, int]]:
        """Empty one ring into the slots' bitmaps, without the GIL.

        Returns
        -------
        drained : int
            Entries read and marked for reset.
        overflow : bool
            The ring has lost entries, or may have.
        foreign : (count, slot, offset)
            Entries that name no page of ours; the slot and offset of the last.

        Notes
        -----
        O(entries of the ring). Acquire on an entry's flag before its contents,
        release on the reset mark after them.

        References
        ----------
        ``kvm_dirty_ring_push`` and ``kvm_dirty_ring_reset`` in Linux ``virt/kvm/dirty_ring.c``.
        """
        cdef dl_ring_result result
        if ring.ring.entries == NULL:
            raise ValueError("the ring is closed, and with it its VM")
        with nogil:
            result = dl_ring_drain(&ring.ring, self.slots, self.nslots)
        return result.drained, bool(result.overflow), (result.foreign, result.bad_slot, result.bad_offset)

    def drain_and_reset(self, handle, list rings not None) -> None:
        """Empty all rings into the slots' bitmaps, let KVM take the entries back, and record both.

        Raises
        ------
        OSError
            The reset failed with the kernel's errno; what was read stays here, and what is left to be
            taken back is asked for the next time (I5).

        Notes
        -----
        One call: a signal handler runs before it or after it, and finds what was marked for reset
        accounted for. What was found wrong stays in `overflowed`, `expected` and `taken_back`, and in
        `foreign` until `forget_foreign`.
        """
        cdef dl_ring_result result
        cdef Ring ring
        # What only behaves like a handle is asked by the name of the method.
        cdef Handle real = handle if isinstance(handle, Handle) else None
        cdef uint64_t reset = 0
        cdef int answer = 0
        cdef Py_ssize_t i
        if real is not None:
            real.enter()
        try:
            for i in range(len(rings)):
                ring = rings[i]
                if ring.ring.entries == NULL:
                    raise ValueError("the ring is closed, and with it its VM")
                with nogil:
                    result = dl_ring_drain(&ring.ring, self.slots, self.nslots)
                self.outstanding += result.drained
                ring.taken += result.drained
                if result.overflow:
                    self.overflowed = <int>i
                if result.foreign:
                    self.foreign_entry = result
                    self.foreign_ring = <int>i
            if self.outstanding:
                if real is None:
                    reset = handle.reset_rings(self.outstanding)
                else:
                    answer = real.reset(self.outstanding, &reset)
                if answer < 0:
                    self.outstanding -= min(reset, self.outstanding)
                else:
                    # The kernel stops at an entry that it has overwritten since we read it.
                    if reset != self.outstanding:
                        self.expected, self.taken_back = self.outstanding, reset
                    self.outstanding = 0
        finally:
            # Last. A run that begins before the reset may find its ring full; were it to count this harvest among those
            # before it, a ring that has just been emptied would pass for one that overflowed. Pairs with `harvests`.
            dl_fetch_add(&self.ended, 1)
            if real is not None:
                dl_gate_leave(&real.gate)
        if answer < 0:
            fail(answer, "KVM_RESET_DIRTY_RINGS")

    @property
    def harvests(self) -> int:
        """How often the rings were emptied, without a lock: what it counts, KVM_RUN knows of."""
        return dl_load_acquire(&self.ended)

    @property
    def foreign(self) -> tuple[int, int, int] | None:
        """Ring, slot and offset of an entry that names no page of ours; None when there was none."""
        if self.foreign_ring < 0:
            return None
        return self.foreign_ring, self.foreign_entry.bad_slot, self.foreign_entry.bad_offset

    def forget_foreign(self) -> None:
        """Note that every slot knows of the foreign entry by now."""
        self.foreign_ring = -1
