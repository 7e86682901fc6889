"""A shared log marked by processes, forked ones and ones that are killed included, against harvests."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl

pytestmark = pytest.mark.stress

NPAGES = (1 << 21) + 5
# Above what is counted: a region for a writer that is killed, whatever it was doing.
SPARE = 10_000
WAYS = ("range", "pages")


@contextlib.contextmanager
def writer(here, log, *more):
    descriptor = log.fileno()
    environment = {**os.environ, "PYTHONPATH": str(Path(dl.__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, here / "log_writer.py", str(descriptor), str(log.npages), *map(str, more)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        pass_fds=[descriptor],
    )
    try:
        yield process
    finally:
        if more:
            process.kill()
        process.stdin.close()
        process.wait()
        process.stdout.close()


def test_every_mark_of_any_process_is_in_one_harvest(stress):
    random = np.random.default_rng(2)
    counted = dl.DirtyPages.from_runs([[0, NPAGES]], NPAGES + SPARE)
    with dl.SharedLog.create(NPAGES + SPARE) as log, contextlib.ExitStack() as stack:
        processes = [stack.enter_context(writer(stress.here, log)) for _ in range(2)]

        def enter(ledger, harvested):
            pages = (harvested & counted).words[: -(-NPAGES // 64)]
            ledger.enter(dl.DirtyPages.from_words(pages, NPAGES))

        for number in stress.rounds():
            ledger = stress.ledger(NPAGES)
            cuts = [0, *np.unique(random.integers(1, NPAGES, 60)).tolist(), NPAGES]
            pieces = [(cuts[i], cuts[i + 1] - cuts[i], WAYS[random.integers(2)]) for i in range(len(cuts) - 1)]
            # A few one by one, cut from the longest.
            first, count, _ = max(pieces, key=lambda piece: piece[1])
            pieces.remove((first, count, _))
            pieces += [(first, 1000, "one"), (first + 1000, count - 1000, "range")]
            hands = [pieces[hand::3] for hand in range(3)]

            def tell(process, hand, number=number):
                words = (f"{first} {count} {way}" for first, count, way in hand)
                process.stdin.write(" ".join(["fork" if number % 4 == 0 else "here", *words]) + "\n")
                process.stdin.flush()
                assert process.stdout.readline() == "done\n", "a writer ended"

            def mark_here(hand=hands[2]):
                for first, count, way in hand:
                    if way == "range":
                        log.mark_range(first, count)
                    else:
                        log.mark_pages(np.arange(first, first + count))

            tellers = [lambda p=p, hand=hand: tell(p, hand) for p, hand in zip(processes, hands[:2], strict=True)]
            with contextlib.ExitStack() as dying:
                if number % 16 == 1:
                    # Killed in the middle of its marks when the round is over; nobody else's may suffer.
                    victim = dying.enter_context(writer(stress.here, log, NPAGES, SPARE))
                    assert victim.stdout.readline() == "ready\n"
                with stress.side_by_side(*tellers, mark_here) as busy:
                    while busy():
                        enter(ledger, log.harvest())
            enter(ledger, log.harvest())
            ledger.close()
            for _, count, way in pieces:
                stress.count(f"SharedLog {way}", count)
