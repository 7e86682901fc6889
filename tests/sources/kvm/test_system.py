"""The device: what it answers, what it cannot do without, who closes what it has opened."""

import doctest
import os

import pytest

from dirtylog import BackendUnavailable, DirtyLogError
from dirtylog.sources import kvm

from .guests import needs_kvm, probed


def test_a_missing_device_is_unavailable_and_the_message_says_why_and_what_instead():
    with pytest.raises(BackendUnavailable, match=r"open\('/nowhere/kvm'\): ENOENT; load the kvm module") as caught:
        kvm.Kvm("/nowhere/kvm")
    assert isinstance(caught.value, DirtyLogError)


def test_a_device_that_is_not_kvm_is_unavailable():
    with pytest.raises(BackendUnavailable, match="KVM_GET_API_VERSION"):
        kvm.Kvm("/dev/null")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its permissions for a moment")
def test_without_permission_the_message_names_the_group(tmp_path):
    device = tmp_path / "kvm"
    device.touch(mode=0o600)
    os.seteuid(65534)
    try:
        with pytest.raises(BackendUnavailable, match="EACCES; join the group"):
            kvm.Kvm(str(device))
    finally:
        os.seteuid(0)


def test_probe_answers_for_a_machine_without_kvm():
    found = kvm.probe("/nowhere/kvm")
    assert (found.available, found.api_version, found.capabilities) == (False, 0, {})
    assert "ENOENT" in found.reason


@needs_kvm
def test_probe_answers_with_version_and_capabilities():
    assert probed.api_version == 12
    assert probed.reason == ""
    assert probed.capabilities["KVM_CAP_USER_MEMORY"] == 1


@needs_kvm
def test_capabilities_are_read_only_and_named_like_the_kernels_constants():
    with kvm.Kvm() as system:
        assert system.capabilities["KVM_CAP_NR_MEMSLOTS"] == system.check(10) > 0
        with pytest.raises(TypeError):
            system.capabilities["KVM_CAP_USER_MEMORY"] = 0


@needs_kvm
def test_the_example_of_the_module_runs_as_it_stands():
    example = doctest.DocTestParser().get_doctest(
        kvm.__doc__.replace("# doctest: +SKIP", ""), {}, "kvm", kvm.__file__, 0
    )
    assert doctest.DocTestRunner().run(example).failed == 0


@needs_kvm
def test_closing_kvm_closes_its_machines():
    with kvm.Kvm() as system:
        vm = system.create_vm()
    assert vm.closed


@needs_kvm
@pytest.mark.parametrize("name", ["Kvm", "VM"])
def test_what_is_forgotten_is_closed_with_a_warning(name):
    if name == "Kvm":
        forgotten = [kvm.Kvm()]
        descriptor = forgotten[0]._handle.fileno()
        with pytest.warns(ResourceWarning, match="unclosed <Kvm /dev/kvm, open>"):
            forgotten.clear()
    else:
        with kvm.Kvm() as system:
            forgotten = [system.create_vm()]
            descriptor = forgotten[0]._handle.fileno()
            with pytest.warns(ResourceWarning, match=r"unclosed <kvm.VM 0"):
                forgotten.clear()
    assert not os.path.exists(f"/proc/self/fd/{descriptor}")
