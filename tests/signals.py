"""Signals for code that must bear them: to the thread that runs a test, and none of them late."""

import signal
import threading
from contextlib import contextmanager


@contextmanager
def signalled(handler, every=0.0):
    """Call `handler` in the main thread again and again, by a signal, until the block ends.

    Not by a timer of the process: SIGALRM is pytest-timeout's, and one that another, waiting thread was to take arrives
    after the block, when it is the time-out's again. These are sent to the one thread, which takes them at once.

    Parameters
    ----------
    handler : callable
        Of a signal.
    every : float
        Seconds from one to the next; without, as fast as they can be sent.
    """
    over = threading.Event()
    main = threading.main_thread().ident

    def send():
        while not over.wait(every):
            signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        over.set()
        sender.join()
        signal.signal(signal.SIGUSR1, before)
