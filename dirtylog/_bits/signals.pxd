# What a signal handler raises while the GIL is not let go of: _bits/signals.h.
cdef extern from "_bits/signals.h":
    bint dl_signals_raise() noexcept
    int dl_raised() except -1
