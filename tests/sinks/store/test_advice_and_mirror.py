"""Which chunks cost least, and a mirror that says of itself whether it is whole."""

import asyncio
import signal
import threading

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.sinks.store import Mirror, advise_chunks

SHAPE = (8192, 4096)


def test_scattered_pages_want_small_chunks_and_long_runs_large_ones():
    npages = 8192 * 4
    scattered = dl.DirtyPages.from_indices(np.arange(20) * 1601, npages)
    run = dl.DirtyPages.from_runs([[0, 4096]], npages)
    small = advise_chunks([scattered] * 3, SHAPE, 4)[0]
    assert (small.chunks, small.requests, small.amplification) == ((1, 4096), 20, 4)
    large = advise_chunks([run], SHAPE, 4)[0]
    assert large.chunks == (512, 4096)
    assert (large.amplification, large.chunk_count) == (1, 16)


def test_a_slow_store_wants_fewer_requests_and_a_thin_line_fewer_bytes():
    rng = np.random.default_rng(5)
    pages = [dl.DirtyPages.from_indices(np.unique(rng.integers(0, 32768, 300)), 32768) for _ in range(3)]
    slow = advise_chunks(pages, SHAPE, 4, latency=1, bandwidth=1e9)[0]
    thin = advise_chunks(pages, SHAPE, 4, latency=0.001, bandwidth=1e6)[0]
    assert slow.requests < thin.requests
    assert slow.nbytes > thin.nbytes


def test_epochs_of_a_trace_and_shapes_of_ones_own(tmp_path):
    pytest.importorskip("pyarrow")
    from dirtylog.sinks.trace import Recorder, Trace

    with Recorder(tmp_path / "t", 64) as recorder:
        recorder.write(0.5, dl.DirtyPages.from_indices([3], 64))
        recorder.write(1.0, dl.DirtyPages.from_indices([5, 40], 64))
    with Trace(tmp_path / "t") as trace:
        (advice,) = advise_chunks(trace.epochs(), (64, 512), 8, candidates=[(8, 512)])
    assert (advice.chunks, advice.requests, advice.chunk_count) == ((8, 512), 1.5, 8)


def test_no_epochs_is_no_advice():
    with pytest.raises(ValueError, match="no epochs"):
        advise_chunks([], SHAPE, 4)
    with pytest.raises(ValueError, match="above 0"):
        advise_chunks([], SHAPE, 4, bandwidth=0)


def test_a_mirror_follows_and_says_whether_it_is_whole(tracked, tmp_path, equal, monkeypatch):
    pytest.importorskip("zarr", minversion="3.1")
    arrays = {"w": dl.zeros((16, 512)), "b": dl.zeros(100, "M8[s]")}
    mirror = Mirror(tracked(arrays), arrays, tmp_path / "m.zarr", chunks={"w": (4, 512)})
    assert mirror.whole is None
    arrays["w"][:] = 1
    assert mirror.save().whole == ("w", "b")
    arrays["w"][5] = 2
    saved = mirror.save()
    assert (saved.chunks, saved.snapshot, mirror.whole) == (1, "", 2)
    equal(mirror.restore(), arrays)
    assert mirror.save().written is False

    from dirtylog.sinks.store import mirror as module

    def fail(store, work):
        raise OSError("the disk is full")

    arrays["w"][6] = 3
    with monkeypatch.context() as patched:
        patched.setattr(module, "write", fail)
        with pytest.raises(OSError, match="full"):
            mirror.save()
    assert mirror.whole is None
    with pytest.raises(ValueError, match="torn"):
        mirror.restore()
    assert mirror.save().chunks == 1
    out = {name: np.empty_like(array) for name, array in arrays.items()}
    mirror.restore(out=out)
    equal(out, arrays)


class Interrupted(BaseException):
    """What a signal handler raises, as Ctrl-C does."""


def test_a_save_that_is_interrupted_writes_nothing_over_the_next_one(tracked, equal):
    zarr = pytest.importorskip("zarr", minversion="3.1")
    taken = threading.Event()

    def interrupt(*_):
        taken.set()
        raise Interrupted

    class Slow(zarr.storage.MemoryStore):
        begun = ended = 0
        interrupts = False

        async def set(self, key, value, *more):
            self.begun += 1
            if self.interrupts and "/c/" in key:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
                for _ in range(2000):  # the main thread has the GIL now and then
                    await asyncio.sleep(0)
                while not taken.is_set():
                    await asyncio.sleep(0)
            await super().set(key, value, *more)
            self.ended += 1

    arrays = {"w": dl.zeros((64, 512))}
    store = Slow()
    mirror = Mirror(tracked(arrays), arrays, store, chunks=(1, 512))
    mirror.save()
    arrays["w"][3] = 1
    store.interrupts = True
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(Interrupted):
            mirror.save()
        assert store.begun == store.ended  # nothing is on its way, to land when it will
    finally:
        signal.signal(signal.SIGUSR1, before)
    store.interrupts = False
    assert mirror.whole is None
    arrays["w"][3] = 2
    assert mirror.save().chunks == 1
    equal(mirror.restore(), arrays)
