"""Checkpoint a NumPy array: a base file, then one small file a step; a failed step loses nothing."""

import tempfile
from pathlib import Path

import numpy as np

import dirtylog as dl

STEPS = 10


def save(path: Path, array: np.ndarray, observer: dl.Observer) -> int:
    """Write the rows that share a page with what changed since the last checkpoint; returns how many."""
    with observer.collect() as epoch:
        rows = epoch.pages.rows(array)
        np.savez(path, rows=rows, values=array[rows])
        return len(rows)


def restore(directory: Path, like: np.ndarray) -> np.ndarray:
    """Lay the checkpoints over each other, in order."""
    restored = np.zeros_like(like)
    for path in sorted(directory.glob("*.npz")):
        with np.load(path) as step:
            restored[step["rows"]] = step["values"]
    return restored


def main() -> None:
    """Change an array in steps, checkpoint each, fail once, restore."""
    generator = np.random.default_rng(0)
    array = np.zeros((4096, 500))  # 16 MB, of any shape and order
    array[:] = generator.random(array.shape)
    with tempfile.TemporaryDirectory() as name, dl.track(array) as tracker:
        directory = Path(name)
        log = dl.DirtyLog()
        log.attach(tracker)
        observer = log.observer("checkpoint", everything=True)
        print(f"base: {save(directory / '00.npz', array, observer)} rows")
        for step in range(1, STEPS):
            array[generator.integers(0, len(array), 20)] += 1.0
            if step == 5:
                try:
                    save(directory / "nowhere" / "05.npz", array, observer)
                except FileNotFoundError:
                    print(f"step {step}: failed; its rows are in the next one")
                    continue
            print(f"step {step}: {save(directory / f'{step:02}.npz', array, observer)} rows")
        assert (restore(directory, array) == array).all()
        print("restored: equal, byte for byte")


if __name__ == "__main__":
    main()
