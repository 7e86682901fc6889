"""Saving what is dirty to a store of chunks against writing the arrays whole: time and bytes, local and over S3.

``python -m benchmarks.store [--s3] [--mebibytes N]``: an array of N MiB (128), of which 0.1, 1, 10 and 100 % of the
pages are dirty, and 20 scattered pages, in chunks of 128 KiB and of 1 MiB. Each epoch is measured in turns with writing
the array whole to the same repository, as who knows nothing of dirty pages does it: by assignment to a Zarr array, and
a commit. The ratios are of medians. ``--s3`` adds moto's server on loopback: it shows the number of requests and bytes,
not the latency of a network.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import dirtylog as dl
from dirtylog.sinks.store import StoreSink, repository

ROUNDS = 5


def bytes_of(directory: Path) -> int:
    """Count the bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@contextmanager
def local() -> Iterator[tuple[Any, Callable[[], int]]]:
    """A repository in a directory, and what counts its bytes."""
    with tempfile.TemporaryDirectory(prefix="dirtylog-store-") as name:
        yield repository(name), lambda: bytes_of(Path(name))


@contextmanager
def s3() -> Iterator[tuple[Any, Callable[[], int]]]:
    """A repository in moto's S3 on loopback, and what counts the bytes that were sent to it."""
    import urllib.request

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    sent = [0]
    app = DomainDispatcherApplication(create_backend_app)
    # moto lists what another of its threads removes.
    alone = threading.Lock()

    def counting(environ: Any, start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "PUT":
            sent[0] += int(environ.get("CONTENT_LENGTH") or 0)
        with alone:
            return app(environ, start_response)

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: Any) -> None:
            pass

    server = make_server("127.0.0.1", 0, counting, threaded=True, request_handler=Quiet)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with urllib.request.urlopen(urllib.request.Request(f"{url}/arrays", method="PUT"), timeout=30):
        pass
    options: dict[str, Any] = {"region": "us-east-1", "endpoint_url": url, "allow_http": True, "force_path_style": True}
    keys: dict[str, Any] = {"access_key_id": "test", "secret_access_key": "test"}
    try:
        yield repository("s3://arrays/benchmark", **options, **keys), lambda: sent[0]
    finally:
        server.shutdown()
        server.server_close()


def scattered(rng: np.random.Generator, npages: int, count: int) -> np.ndarray[Any, Any]:
    """Choose pages far from each other."""
    return rng.choice(npages, count, replace=False)


def whole(repo: Any, branch: str, array: np.ndarray[Any, Any]) -> None:
    """Write the array, all of it, and commit."""
    session = repo.writable_session(branch)
    zarr.open_array(session.store, path="w", mode="r+")[:] = array
    session.commit("whole")


def tidy(repo: Any) -> None:
    """Remove all snapshots but the newest of each branch: moto keeps what it has in memory."""
    now = datetime.now(UTC)
    repo.expire_snapshots(now)
    repo.garbage_collect(now)


def measure(where: str, repo: Any, size: Callable[[], int], chunk_rows: int, mebibytes: int) -> None:
    """Print a table of one kind of store and one size of chunks."""
    array = dl.empty((mebibytes * 64, 4096), "f4")  # rows of 16 KiB
    rng = np.random.default_rng(1)
    array[:] = rng.standard_normal(array.shape, "f4")
    flat = array.reshape(-1, 1024)  # pages
    branch, plain = f"rows-{chunk_rows}", f"plain-{chunk_rows}"
    for each in (branch, plain):
        repo.create_branch(each, repo.lookup_branch("main"))
    session = repo.writable_session(plain)
    options = {"shape": array.shape, "dtype": array.dtype, "compressors": None}
    zarr.create_array(session.store, name="w", chunks=(chunk_rows, 4096), **options)
    session.commit("made")
    with dl.track(array) as tracker:
        log = dl.DirtyLog()
        log.attach(tracker)
        sink = StoreSink(log.observer("store"), {"w": array}, repo, branch, chunks=(chunk_rows, 4096), compressors=None)
        sink.save()
        for name, count in [
            ("20 pages", 20),
            *((f"{share:g} %", max(1, int(len(flat) * share / 100))) for share in (0.1, 1, 10, 100)),
        ]:
            seconds: dict[str, list[float]] = {"epoch": [], "whole": []}
            nbytes: dict[str, list[int]] = {"epoch": [], "whole": []}
            for _ in range(ROUNDS):
                flat[scattered(rng, len(flat), count), :8] += 1
                for kind in ("epoch", "whole"):
                    before, start = size(), time.perf_counter()
                    if kind == "whole":
                        whole(repo, plain, array)
                    else:
                        saved = sink.save()
                    seconds[kind].append(time.perf_counter() - start)
                    nbytes[kind].append(size() - before)
                    if kind == "epoch":
                        chunks = saved.chunks
            times = {kind: statistics.median(each) for kind, each in seconds.items()}
            sizes = {kind: statistics.median(each) for kind, each in nbytes.items()}
            print(
                f"{where:6} {chunk_rows * 16:5} KiB  {name:>9}  {chunks:5} chunks  "
                f"{times['epoch'] * 1e3:7.0f} ms, whole {times['whole'] * 1e3:7.0f} ms: "
                f"{times['whole'] / times['epoch']:5.1f} x  "
                f"{sizes['epoch'] / 2**20:7.2f} MiB, whole {sizes['whole'] / 2**20:7.2f} MiB: "
                f"{sizes['whole'] / max(1, sizes['epoch']):5.1f} x",
                flush=True,
            )
            tidy(repo)


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument("--s3", action="store_true", help="over moto's S3 on loopback as well")
    parser.add_argument("--mebibytes", type=int, default=128, help="size of the array (128)")
    args = parser.parse_args()
    import icechunk

    icechunk.set_logs_filter("error")
    print(f"{os.cpu_count()} CPUs, icechunk {icechunk.__version__}, {args.mebibytes} MiB of float32")
    for where, opened in [("local", local), *([("S3", s3)] if args.s3 else [])]:
        for chunk_rows in (8, 64):
            with opened() as (repo, size):
                measure(where, repo, size, chunk_rows, args.mebibytes)


if __name__ == "__main__":
    main()
