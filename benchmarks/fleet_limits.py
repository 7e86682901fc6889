"""Where a fleet's checkpoint meets its limits, to 10 000 workers: a simulation from what was measured and assumed.

``python -m benchmarks.fleet_limits``: epochs of 100, 1000 and 10 000 workers with 10 GiB each, in chunks of 1 MiB, of
which each worker has 20 or 1000 dirty ones. Every request's latency is drawn; the slowest worker decides. Nothing is
run: the constants are below, with where they come from, and the page in the documentation says what they mean.
"""

import argparse

import numpy as np

# Measured with Icechunk 1.1 on one core; chunks that are objects of their own.
MANIFEST_BYTES_PER_CHUNK = 20  # 97 875 bytes for 5000
FORK_BYTES, FORK_BYTES_PER_CHUNK = 700, 19  # pickled: 1084 for 20 chunks
MERGE_SECONDS, FORK_SECONDS = 0.00003, 0.00004
# What S3 says of itself, and its price in the first region, in dollars.
PUTS_PER_SECOND_AND_PREFIX, PUT_PRICE, GET_PRICE, GIB_MONTH_PRICE = 3500, 0.005 / 1000, 0.0004 / 1000, 0.023
# Assumed: a call to a worker and its answer, at the coordinator: serialising and two messages.
CALL_SECONDS = 0.0002
# Assumed: a request's median latency and its spread, a worker's bandwidth, the coordinator's, hours between failures.
PUT_SECONDS, PUT_SPREAD, WORKER_BANDWIDTH, COORDINATOR_BANDWIDTH = 0.03, 0.6, 250e6, 500e6
HOURS_TO_FAILURE = 5000
SNAPSHOT_BYTES_PER_MANIFEST = 60
AT_ONCE, GIB, CHUNK = 32, 10, 1 << 20


def epoch(rng: np.random.Generator, workers: int, dirty: int, prefixes: int, split: int, fan: int) -> dict[str, float]:
    """Simulate one epoch; return its parts in seconds, its cost in dollars, and what it writes.

    Parameters
    ----------
    rng : numpy.random.Generator
        For latencies.
    workers, dirty : int
        Workers, and dirty chunks of each.
    prefixes : int
        Prefixes over which the store spreads requests.
    split : int
        Chunks per manifest; 0 for one manifest of all.
    fan : int
        Workers below one coordinator of a tree; 0 for none.
    """
    chunks = workers * GIB * 1024
    waves = -(-dirty // AT_ONCE)
    latency = rng.lognormal(np.log(PUT_SECONDS), PUT_SPREAD, (workers, waves, min(dirty, AT_ONCE))).max(2).sum(1)
    by_worker = np.maximum(latency, dirty * CHUNK / WORKER_BANDWIDTH).max()
    by_store = workers * dirty / (PUTS_PER_SECOND_AND_PREFIX * prefixes)
    below = min(fan, workers) if fan else workers
    levels = 1 if not fan or workers <= fan else 2
    each = 4 * CALL_SECONDS + FORK_SECONDS + MERGE_SECONDS  # resolve, prepare, decide, and the answers
    carried = workers * (FORK_BYTES + dirty * FORK_BYTES_PER_CHUNK)
    coordinator = levels * below * each + carried / COORDINATOR_BANDWIDTH
    touched = float(chunks)
    if split:
        # Dirty chunks of one worker lie in its own manifests.
        manifests_of_a_worker = max(1, GIB * 1024 // split)
        hit = manifests_of_a_worker * (1 - (1 - 1 / manifests_of_a_worker) ** dirty)
        touched = min(chunks, workers * hit * split)
    manifest = touched * MANIFEST_BYTES_PER_CHUNK
    listed = chunks / split * SNAPSHOT_BYTES_PER_MANIFEST if split else 0
    commit = (manifest + listed) / COORDINATOR_BANDWIDTH + 4 * PUT_SECONDS
    seconds = max(by_worker, by_store) + coordinator + commit
    return {
        "workers": float(max(by_worker, by_store)),
        "coordinator": coordinator,
        "commit": commit,
        "seconds": float(seconds),
        "manifest": manifest,
        "dollars": workers * dirty * PUT_PRICE + GET_PRICE * workers,
        "aborted": 1 - np.exp(-seconds / 3600 * workers / HOURS_TO_FAILURE),
    }


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(prog="python -m benchmarks.fleet_limits", description=__doc__).parse_args()
    rng = np.random.default_rng(16)
    print("| workers | dirty chunks each | how | workers | coordinator | commit | all | manifest | dollars | aborted |")
    print("|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|")
    ways = {"plain": (1, 0, 0), "split, tree": (16, 128, 100)}
    for workers in (100, 1000, 10_000):
        for dirty in (20, 1000):
            for name, way in ways.items():
                found = epoch(rng, workers, dirty, *way)
                print(
                    f"| {workers} | {dirty} | {name} | {found['workers']:.1f} s | {found['coordinator']:.1f} s | "
                    f"{found['commit']:.1f} s | {found['seconds']:.1f} s | {found['manifest'] / 2**20:.0f} MiB | "
                    f"{found['dollars']:.2f} | {found['aborted']:.2%} |"
                )


if __name__ == "__main__":
    main()
