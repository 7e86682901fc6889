"""What every test shares: hypothesis draws the same examples on every run, and no test leaves a thread behind."""

import os
import threading

import pytest
from hypothesis import HealthCheck, settings

# A test that fails must fail for everybody: examples follow from the test's
# name, not from chance. DIRTYLOG_HYPOTHESIS=thorough looks further, at random.
settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", parent=settings.get_profile("repeatable"), derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("DIRTYLOG_HYPOTHESIS", "repeatable"))


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]
    assert not left, f"still running: {left}"
