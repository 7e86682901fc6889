"""KVM's dirty log from Python: open /dev/kvm, ask what it can do, make virtual machines.

Examples
--------
>>> from dirtylog.sources import kvm
>>> program = [0xC6, 0x06, 0x00, 0x30, 0x07, 0xF4]  # mov byte [0x3000], 7; hlt
>>> with kvm.Kvm() as system, system.create_vm() as vm:  # doctest: +SKIP
...     vm.set_memory_region(0, base_gfn=0, npages=16)
...     vm.memory(0)[:6] = program
...     cpu = vm.create_vcpu()
...     cpu.enter_real_mode(0)
...     cpu.run().reason
...     vm.get_dirty_log(0).indices()
'HLT'
array([3])
"""

from __future__ import annotations

from dirtylog._public import publish
from dirtylog.sources.kvm.machine import VM
from dirtylog.sources.kvm.memslots import Slot
from dirtylog.sources.kvm.system import Kvm, Probe, probe
from dirtylog.sources.kvm.vcpu import Dtable, Exit, Regs, Segment, Sregs, Vcpu

__all__ = ["VM", "Dtable", "Exit", "Kvm", "Probe", "Regs", "Segment", "Slot", "Sregs", "Vcpu", "probe"]

publish(__name__, globals(), __all__)
