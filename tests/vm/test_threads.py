"""vCPUs that store while others harvest: nothing is lost, and the GIL is free."""

import sys
import threading

import numpy as np
import pytest

import dirtylog as dl

ITERATIONS = 25


def test_the_value_oracle_agrees_while_two_vcpus_store(harvesting, kit):
    vm = kit.machine(harvesting, npages=300)
    oracle = kit.oracle(vm)
    reported = 0
    with kit.writers(vm) as writers:
        for _ in range(ITERATIONS):
            iteration = writers.next_iteration()
            reported += oracle.check(vm.get_dirty_log(0), iteration)
    oracle.check(vm.get_dirty_log(0), writers.iteration)
    assert not oracle.pending.any()
    assert vm.get_dirty_log(0).count == 0
    assert reported > 0


def copy_pages(dirty, source, replica):
    pages = dirty.indices()
    replica.reshape(dirty.npages, -1)[pages] = source.reshape(dirty.npages, -1)[pages]


def test_copying_by_the_log_while_vcpus_store_ends_in_equal_memory(harvesting, kit):
    vm = kit.machine(harvesting, npages=257)
    source = vm.memory(0)
    replica = np.zeros_like(source)
    with kit.writers(vm) as writers:
        for _ in range(ITERATIONS):
            writers.next_iteration()
            copy_pages(vm.get_dirty_log(0), source, replica)
    copy_pages(vm.get_dirty_log(0), source, replica)
    assert source.any()
    np.testing.assert_array_equal(replica, source)


def test_a_harvest_that_meets_a_store_half_way_reports_the_rest_of_it(harvesting):
    """The shoot-down: one store of 32 MiB is under way, through an entry cached before, when the log is harvested."""
    size = 1 << 25
    vm = dl.VM(harvesting, page_size=size)
    vm.set_memory_region(0, 0, 1)
    memory = vm.memory(0)
    vm.vcpus[0].write(0, b"\1")
    thread = threading.Thread(target=vm.vcpus[0].write, args=(0, b"\2" * size))
    thread.start()
    while memory[0] != 2:
        pass
    assert vm.get_dirty_log(0).count == 1
    # The end of the page first: a copy from its start would trail the store.
    last = int(memory[-1])
    thread.join()
    assert vm.get_dirty_log(0).count == 1 or last == 2


def test_two_harvesters_share_the_pages_between_them(harvesting, kit):
    vm = kit.machine(harvesting, npages=200)
    found = [[], []]
    stop = threading.Event()

    def harvest(mine):
        while not stop.is_set():
            mine.append(vm.get_dirty_log(0))

    threads = [threading.Thread(target=harvest, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    every = vm.region(0).base_gfn + np.arange(200)
    for _ in range(50):
        vm.vcpus[0].touch(every)
    stop.set()
    for thread in threads:
        thread.join()
    union = vm.get_dirty_log(0)
    for pages in (*found[0], *found[1]):
        union = union | pages
    assert union.count == 200
    assert (vm.memory(0)[::4096] == 50).all()


def test_vcpus_that_touch_the_same_pages_each_count(harvesting, kit):
    vm = kit.machine(harvesting, npages=64)
    pages = np.tile(kit.base_gfn + np.arange(64), 50)
    threads = [threading.Thread(target=vcpu.touch, args=(pages,)) for vcpu in vm.vcpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (vm.memory(0)[::4096] == 100).all()


def test_a_slot_moves_and_comes_and_goes_while_vcpus_store(harvesting, kit):
    vm = kit.machine(harvesting, npages=100)
    with kit.writers(vm) as writers:
        for turn in range(10):
            writers.next_iteration()
            # Stores to slot 0 go on; slot 1 comes, moves and goes beside it.
            vm.set_memory_region(1, 1000 + turn, 64)
            vm.set_memory_region(1, 2000 + turn, 64)
            vm.vcpus[0].touch([2000 + turn])
            assert vm.get_dirty_log(1).indices().tolist() == [0]
            vm.set_memory_region(1, 2000 + turn, 0)
            with pytest.raises(OSError, match="no memslot"):
                vm.vcpus[1].touch([2000 + turn])


def test_no_write_is_lost_while_a_slot_moves_back_and_forth(harvesting, kit):
    vm = kit.machine(harvesting, vcpus=2, npages=64)
    here, there = kit.base_gfn, kit.base_gfn + 1000
    stop = threading.Event()
    seen = []

    def store():
        pages = np.arange(64)
        while not stop.is_set():
            for base in (here, there):
                try:
                    vm.vcpus[1].touch(base + pages)
                except OSError:
                    seen.append(base)

    source, replica = vm.memory(0), np.zeros(64 * 4096, np.uint8)
    thread = threading.Thread(target=store)
    thread.start()
    for turn in range(30):
        vm.set_memory_region(0, (there, here)[turn % 2], 64)
        copy_pages(vm.get_dirty_log(0), source, replica)
    stop.set()
    thread.join()
    copy_pages(vm.get_dirty_log(0), source, replica)
    np.testing.assert_array_equal(replica, source)


def call_while_locked(lock, call):
    """Run `call` in a thread while this one holds `lock`; True if this thread got to run meanwhile."""
    entered, done = threading.Event(), threading.Event()

    def run():
        entered.set()
        call()
        done.set()

    thread = threading.Thread(target=run)
    interval = sys.getswitchinterval()
    # From entered.set() on the thread keeps the GIL until it gives it away itself.
    sys.setswitchinterval(1000)
    try:
        with lock:
            thread.start()
            assert entered.wait(60)
            # If `call` waited with the GIL, this line would never be reached.
            blocked = not done.is_set()
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    return blocked and done.is_set()


@pytest.mark.parametrize("call", ["touch", "store", "write", "harvest", "peek-slots", "region"])
def test_waiting_for_a_lock_lets_other_python_threads_run(call, kit):
    vm = kit.machine("x86")
    gfn = kit.base_gfn
    lock, function = {
        "touch": (vm.mmu_lock, lambda: vm.vcpus[0].touch([gfn])),
        "store": (vm.mmu_lock, lambda: vm.vcpus[0].store([gfn], 1)),
        "write": (vm.mmu_lock, lambda: vm.vcpus[0].write(gfn * 4096, b"x")),
        "harvest": (vm.mmu_lock, lambda: vm.get_dirty_log(0)),
        "peek-slots": (vm.slots_lock, lambda: vm.peek(0)),
        "region": (vm.slots_lock, lambda: vm.set_memory_region(1, 9000, 1)),
    }[call]
    assert call_while_locked(lock, function)


def test_mmu_lock_excludes_a_fault_that_runs_without_the_gil(kit):
    vm = kit.machine("x86")
    entered = threading.Event()

    def run():
        entered.set()
        vm.vcpus[0].touch([kit.base_gfn])

    thread = threading.Thread(target=run)
    with vm.mmu_lock:
        thread.start()
        entered.wait(60)
        assert vm.memory(0)[0] == 0
        assert vm.vcpus[0].faults == 0
    thread.join()
    assert vm.memory(0)[0] == 1
    assert vm.vcpus[0].faults == 1


def test_a_lock_taken_twice_in_one_thread_is_an_error_not_a_hang(kit):
    vm = kit.machine("x86")
    with vm.mmu_lock:
        with pytest.raises(RuntimeError, match="mmu_lock"), vm.mmu_lock:
            pass
        with pytest.raises(RuntimeError, match="holds a lock"):
            vm.vcpus[0].touch([kit.base_gfn])
    with vm.slots_lock, pytest.raises(RuntimeError, match="slots_lock"):
        vm.get_dirty_log(0)
    vm.vcpus[0].touch([kit.base_gfn])
    assert vm.get_dirty_log(0).count == 1


def test_a_harvest_takes_mmu_lock_itself(harvesting, kit):
    vm = kit.machine(harvesting)
    vm.vcpus[0].touch([kit.base_gfn])
    # A harvest that went on without the lock would find the page here.
    with vm.mmu_lock, pytest.raises(RuntimeError, match=r"holds a lock|mmu_lock"):
        vm.get_dirty_log(0)
    assert vm.get_dirty_log(0).count == 1


def test_a_lock_is_released_only_by_its_holder():
    vm = dl.VM()
    assert not vm.slots_lock.held
    with pytest.raises(RuntimeError, match="not held"):
        vm.slots_lock.__exit__(None, None, None)
    with vm.slots_lock as lock:
        assert lock.held
        assert "held" in repr(lock)
    assert "free" in repr(lock)
