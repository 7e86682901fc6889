"""What tests of this process's own memory share."""

import pytest

from dirtylog.sources.memory import BACKENDS, _tracking


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
