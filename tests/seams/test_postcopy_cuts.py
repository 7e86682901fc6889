"""A copy that runs before it is complete, on a line that is cut at every byte of the words that it takes."""

import secrets

import pytest

from dirtylog.sinks.migrate import MigrationError, status
from dirtylog.sinks.migrate.payloads import EXTENT, HELLO
from dirtylog.sinks.migrate.wire import HEADER_BYTES

from ..sinks.test_migrate_postcopy import Relay, Source, guarded, migrated

pytestmark = pytest.mark.skipif(bool(guarded()), reason=guarded())
NPAGES = 6
# HELLO, LACKING, END and RUN. Then pages.
WORDS = 4 * HEADER_BYTES + HELLO.size + EXTENT.size + 32 + 16
FILLED = HEADER_BYTES + 16
RUNS = ("at-once", "filled")


def cut(forth=None, back=None, again=False, run="at-once"):
    """Migrate over a line that is cut there; return both ends' outcomes and stages, and what came back."""
    source, relay, session = Source(NPAGES), Relay(), secrets.token_hex(16)
    relay.cuts, relay.backs = [forth], [back]
    options = {"reconnect": relay.connect} if again else {}
    resumed = []
    receiver = {"run": run} | ({"reconnect": relay.accept} if again else {})
    outcome, copy = migrated(
        source, relay=relay, session=session, receiver=receiver, resume=lambda: resumed.append(1), **options
    )
    stages = []
    for end in ("source", "copy"):
        try:
            stages.append(status(session, end=end).stage)
        except KeyError:
            stages.append(None)
    started = not copy.started.empty()
    # Never both, whatever is cut.
    assert not (started and (resumed or not source.paused)), (forth, back)
    return source, outcome, copy, tuple(stages), started, relay.back


def test_a_line_that_is_cut_at_any_byte_and_replaced_ends_well():
    *_, back = cut()
    places = [(at, None) for at in (*range(1, WORDS), *range(WORDS, WORDS + 4 * 4096, 997))]
    # Who has said that it is filled waits for nobody: the last word is not said again.
    places += [(None, at) for at in range(1, back - FILLED)]
    for number, (forth, behind) in enumerate(places):
        source, outcome, copy, stages, started, _ = cut(forth, behind, again=True, run=RUNS[number % 2])
        assert not isinstance(outcome, Exception), (forth, behind, outcome)
        assert (copy.answer == source.memory).all(), (forth, behind)
        assert (stages, started) == (("done", "runs"), True), (forth, behind)


@pytest.mark.parametrize("run", RUNS)
def test_a_line_that_is_cut_at_any_byte_for_good_leaves_what_the_table_says(run):
    *_, back = cut(run=run)
    seen = set()
    # Where a copy runs, it waits with its memory to the end of this process: of those not each.
    step = 1 if run == "filled" else 3
    for forth, behind in [*((at, None) for at in range(WORDS - 150, WORDS + 1, step)),
                          *((None, at) for at in range(1, back, step))]:  # fmt: skip
        _, outcome, _, stages, started, _ = cut(forth, behind, run=run)
        if isinstance(outcome, MigrationError) and outcome.uncertain:
            assert stages[0] == "given", (forth, behind)
        assert started == (stages[1] in ("faults", "runs")), (forth, behind, stages)
        seen.add(stages)
    ended = {("live", None), ("live", "gone"), ("given", "gone")}
    table = {
        "at-once": {*ended, ("given", "faults"), ("serves", "faults"), ("serves", "runs"), ("done", "runs")},
        "filled": {*ended, ("serves", "gone"), ("given", "runs"), ("serves", "runs"), ("done", "runs")},
    }
    assert seen <= table[run], seen - table[run]
    assert ended <= seen
