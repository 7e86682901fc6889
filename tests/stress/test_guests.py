"""Guests that come, write, are harvested while they write, and go: of the model and of the real KVM."""

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.errors import BackendUnavailable
from dirtylog.sources import kvm
from dirtylog.sources.kvm._guest import Guest

pytestmark = pytest.mark.stress

BASE_GFN = 1 << 16
NPAGES = 2048


@pytest.mark.parametrize("mode", ["bitmap", "manual", "ring"])
def test_no_write_of_a_real_guest_is_missed_while_guests_come_and_go(stress, replica, mode):
    try:
        kvm.Kvm().close()
    except BackendUnavailable as missing:
        pytest.skip(str(missing))
    counts = [[0, 0], [0, 0]]

    def live(system, index, number):
        random = np.random.default_rng([number, index])
        memory = dl.zeros((NPAGES, 4096), np.uint8)
        with system.create_vm() as vm:
            if mode == "ring":
                vm.enable_dirty_ring(16384)
            elif mode == "manual":
                vm.enable_manual_protect()
            vm.set_memory_region(3, BASE_GFN, NPAGES, memory=memory)
            # Idle instructions: a KVM in software runs past a ring's reserve without them. No round
            # writes more pages than fit the ring, and each is harvested to the end.
            guest = Guest(vm, capacity=4096, padding=40)
            source = vm.slot(3)
            copy = replica(memory[:, 0])
            for turn in range(1, 6):
                pages = random.permutation(NPAGES)[: random.integers(1, NPAGES)]
                with stress.side_by_side(lambda pages=pages, turn=turn: guest.write(BASE_GFN + pages, turn)) as busy:
                    while busy():
                        copy.take(source.harvest())
                copy.take(source.harvest())
                copy.check()
                assert (memory[pages, 0] == turn).all()
                counts[index][0] += pages.size
        counts[index][1] += 1

    with kvm.Kvm() as system:
        for number in stress.rounds():
            with stress.side_by_side(*(lambda i=i, number=number: live(system, i, number) for i in range(2))):
                pass
    for pages, guests in counts:
        stress.count("pages written by KVM guests", pages)
        stress.count("KVM guests", guests)


@pytest.mark.parametrize(
    "how",
    [{}, {"manual_protect": True}, {"pml": True}, {"huge_pages": "on-write"}, {"arch": "arm64"}, {"arch": "s390"}],
    ids=str,
)
def test_no_write_of_a_modelled_guest_is_missed(stress, replica, how):
    written = 0
    for number in stress.rounds():
        vm = dl.VM(vcpus=2, **how)
        vm.set_memory_region(3, BASE_GFN, NPAGES)
        source = vm.slot(3)
        copy = replica(vm.memory(3).view(np.uint64)[:: vm.page_size // 8])
        random = np.random.default_rng(number)
        for turn in range(1, 9):
            # Each vCPU its own half of the pages, in some order.
            hands = np.array_split(random.permutation(NPAGES), 2)

            def write(vcpu, hand, turn=turn):
                for part in np.array_split(hand, 16):
                    vcpu.store(BASE_GFN + part, turn)

            parts = [lambda v=v, hand=hand: write(v, hand) for v, hand in zip(vm.vcpus, hands, strict=True)]
            with stress.side_by_side(*parts) as busy:
                while busy():
                    copy.take(source.harvest())
            copy.take(source.harvest())
            copy.check()
            assert (copy.values == turn).all()
            written += NPAGES
    stress.count("pages written by modelled guests", written)
