"""Reset a fuzzer's target to its snapshot by copying back only the pages that a test case touched."""

import numpy as np

import dirtylog as dl

PAGES = 4096
CASES = 100


def main() -> None:
    """Scribble, reset, compare."""
    state = dl.zeros((PAGES, 4096), dtype="u1")
    state[:] = np.arange(PAGES)[:, None] % 251
    snapshot = state.copy()
    generator = np.random.default_rng(0)
    copied = 0
    with dl.track(state) as tracker:
        for _ in range(CASES):
            state[generator.integers(0, PAGES, 20), 17] += 1
            touched = tracker.harvest()
            touched.copy(snapshot, state)
            copied += touched.count
            tracker.harvest()  # the reset's own writes
    assert (state == snapshot).all()
    print(f"{CASES} resets copied {copied} pages instead of {CASES * PAGES}")


if __name__ == "__main__":
    main()
