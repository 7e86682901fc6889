"""What tests of sources share: the back ends of this process's own memory, a process with many open files."""

import os
import resource

import pytest

from dirtylog.sources.memory import BACKENDS, _tracking


@pytest.fixture
def many_open():
    """More open files than select(2) can number: what is opened from here on has a number above 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"this process may open {hard} files at most")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held = [os.open(os.devnull, os.O_RDONLY)]
    while held[-1] < 1024:
        held.append(os.dup(held[0]))
    yield
    for descriptor in held:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each back end of track(); skipped with the probe's answer where it does not work."""
    if request.param != "compare" and (refusal := _tracking.probe(request.param)):
        pytest.skip(f"{request.param}: {refusal}")
    return request.param


@pytest.fixture
def backend_of_any_memory(backend, sanitized):
    """Each back end that may track an array which does not fill its pages."""
    if sanitized and backend == "compare":
        pytest.skip("compare reads whole pages, also beside the array: its contract, and an overflow to the sanitizer")
    return backend
