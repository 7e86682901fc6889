"""Run a block under a trace function, and give the old one back, a coverage tool's, say."""

import sys
from contextlib import contextmanager


@contextmanager
def traced(trace):
    """Trace what the block calls."""
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
