"""What is checked: each model's properties, the variants that must hold and those that must be refuted."""

from dataclasses import dataclass
from typing import Literal

Expectation = Literal["holds", "refuted"]

# Property -> (macro that switches its assertion on, what it says).
PROPERTIES = {
    "no write is lost": "CHECK_LOSS",
    "I1 at every release of mmu_lock": "CHECK_I1",
    "a push finds a free entry": "CHECK_ROOM",
    "a returned mark is in the next harvest": "CHECK_PROMPT",
    "an overflow is declared of a full ring alone": "CHECK_TRUTH",
    "source and copy never both run": "CHECK_BOTH",
    "one of them runs in the end": "CHECK_NEITHER",
    "only a complete and durable copy is given the right to run": "CHECK_KEPT",
}
LOSS, GOLDEN, ROOM, PROMPT, TRUTH, BOTH, NEITHER, KEPT = PROPERTIES


@dataclass(frozen=True)
class Check:
    """One run of Spin: a model, one property, one variant, and the verdict that it must give."""

    model: str
    claim: str
    variant: str
    expect: Expectation
    defines: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name the check for ``--only``: model/variant/property-macro, in lower case."""
        return f"{self.model}/{self.variant}/{PROPERTIES[self.claim].removeprefix('CHECK_').lower()}"


def _check(model: str, claim: str, *macros: str, variant: str, expect: Expectation) -> Check:
    return Check(model, claim, variant, expect, (PROPERTIES[claim], *macros))


def _holds(model: str, *properties: str, macros: tuple[str, ...] = (), variant: str = "as built") -> list[Check]:
    return [_check(model, name, *macros, variant=variant, expect="holds") for name in properties]


def _refuted(model: str, claim: str, *variants: str, macros: tuple[str, ...] = ()) -> list[Check]:
    return [
        _check(model, claim, *macros, name, variant=name.lower().replace("_", "-"), expect="refuted")
        for name in variants
    ]


CHECKS: tuple[Check, ...] = (
    # I2: the four steps of a harvest, and the fault path.
    *_holds("dirty_log", LOSS, GOLDEN),
    *_holds("dirty_log", LOSS, GOLDEN, macros=("STORE_IN_FAULT",), variant="store in the fault"),
    *_refuted(
        "dirty_log",
        LOSS,
        "FLUSH_LEFT_OUT",
        "FLUSH_BEFORE_PROTECT",
        "COPY_BEFORE_FLUSH",
        "COPY_THEN_ZERO",
        "PROTECT_LEFT_OUT",
        "CLEAR_AFTER_UNLOCK",
        "MARK_BEFORE_STORE",
    ),
    *_refuted("dirty_log", GOLDEN, "CLEAR_BEFORE_LOCK", "CLEAR_AFTER_UNLOCK", "MARK_OUTSIDE_LOCK"),
    # Manual protection: get, clear, copy.
    *_holds("manual_protect", LOSS, GOLDEN),
    *_refuted(
        "manual_protect",
        LOSS,
        "COPY_BEFORE_CLEAR",
        "CLEAR_UNREPORTED",
        "CLEAR_WITHOUT_PROTECT",
        "CLEAR_WITHOUT_FLUSH",
        "GET_CLEARS",
    ),
    # The ring: push, harvest, reset, soft limit.
    *_holds("dirty_ring", LOSS, GOLDEN, ROOM, variant="as built, 2 vCPUs"),
    *_holds("dirty_ring", LOSS, GOLDEN, ROOM, macros=("ONE_VCPU",), variant="as built, 1 vCPU"),
    *_refuted(
        "dirty_ring",
        LOSS,
        "COPY_BEFORE_RESET",
        "FLAG_BEFORE_ENTRY",
        "RESET_UNHARVESTED",
        "FLUSH_LEFT_OUT",
        "PROTECT_LEFT_OUT",
    ),
    *_refuted("dirty_ring", LOSS, "REUSE_BEFORE_RESET", "NO_SOFT_LIMIT", macros=("ONE_VCPU",)),
    *_refuted("dirty_ring", ROOM, "NO_SOFT_LIMIT", macros=("ONE_VCPU",)),
    # I4: the summary level.
    *_holds("summary", LOSS, PROMPT),
    *_refuted(
        "summary",
        LOSS,
        "SUMMARY_AFTER_LEAVES",
        "SUMMARY_BEFORE_LEAF",
        "SUMMARY_LOADED_EARLY",
        "LEAF_COPY_THEN_ZERO",
        "PARTIAL_TAKES_LINE",
    ),
    *_refuted("summary", PROMPT, "SKIP_WHEN_LEAF_IS_SET"),
    # I4: a third level over the summary.
    *_holds("third_level", LOSS, PROMPT, variant="as built"),
    *_holds("third_level", LOSS, macros=("HARVESTERS=2",), variant="as built, 2 harvesters"),
    *_holds("third_level", LOSS, macros=("HARVESTERS=2", "PARTS"), variant="as built, 2 harvesters, parts"),
    *_refuted(
        "third_level",
        LOSS,
        "TOP_AFTER_SUMMARY",
        "TOP_BEFORE_SUMMARY",
        "TOP_LOADED_EARLY",
        "PARTIAL_TAKES_TOP",
        "SUMMARY_LOOKED_AT_EARLY",
        "GIVES_BACK_WITHOUT_TOP",
    ),
    *_refuted("third_level", LOSS, "GIVES_BACK_TOP_FIRST", macros=("HARVESTERS=2",)),
    *_refuted("third_level", LOSS, "PARTIAL_CLEARS_TOP", "PARTIAL_TAKES_LEAF_FIRST", macros=("HARVESTERS=2", "PARTS")),
    *_refuted("third_level", PROMPT, "SKIP_TOP_WHEN_SUMMARY_IS_SET", "TOP_AROUND_SUMMARY"),
    # I3 and I4 with store buffers: x86's order, then stores that leave in any order.
    *(
        check
        for operation in ("MARK", "BATCH", "RANGE")
        for order, macros in (("TSO", ()), ("weak stores", ("WEAK",)))
        for check in _holds("store_buffer", LOSS, macros=(operation, *macros), variant=f"{operation.lower()}, {order}")
    ),
    *(
        check
        for operation in ("MARK", "BATCH", "RANGE")
        for check in _holds(
            "store_buffer",
            LOSS,
            macros=(operation, "WEAK", "THIRD"),
            variant=f"{operation.lower()}, three levels, weak stores",
        )
    ),
    *_holds("store_buffer", LOSS, macros=("RANGE", "RANGE_RELAXED"), variant="range-relaxed, TSO"),
    *_refuted("store_buffer", LOSS, "TEST_INSTEAD_OF_FETCH_OR", macros=("MARK",)),
    *_refuted("store_buffer", LOSS, "TEST_WITHOUT_FENCE", macros=("BATCH",)),
    *_refuted("store_buffer", LOSS, "RANGE_WITHOUT_FENCE", macros=("RANGE",)),
    *_refuted("store_buffer", LOSS, "RANGE_RELAXED", macros=("RANGE", "WEAK")),
    # I5: observers, epochs, roll-back.
    *_holds("observers", LOSS),
    *_refuted(
        "observers",
        LOSS,
        "ROLL_BACK_LEFT_OUT",
        "ROLL_BACK_REPLACES",
        "ROLL_BACK_WITHOUT_LOCK",
        "PARTS_ARE_KEPT",
        "ONLY_THE_COLLECTOR",
        "FORGET_AT_COMMIT",
    ),
    # I1 without a kernel's help: the handler and the harvest of the mprotect engine.
    *_holds("protect", LOSS, GOLDEN),
    *_refuted(
        "protect",
        LOSS,
        "MARK_BEFORE_LOCK",
        "MARK_ONE_TRACKER",
        "CLEAR_AFTER_UNLOCK",
        "PROTECT_LEFT_OUT",
        "COPY_BEFORE_PROTECT",
        "CLEAR_UNPROTECTED",
    ),
    *_refuted("protect", GOLDEN, "MARK_AFTER_UNLOCK"),
    # And where the program makes pages writable itself: protect, look at the mapping, take again.
    *_holds("protect", LOSS, macros=("PROGRAM_OPENS",), variant="the program opens"),
    *_refuted(
        "protect",
        LOSS,
        "LOOK_LEFT_OUT",
        "TAKE_ONCE",
        "LOOK_FOR_ONESELF",
        "PROTECT_ALL_MARKED",
        macros=("PROGRAM_OPENS",),
    ),
    # I5 between trackers: who scans takes for all.
    *_holds("deposits", LOSS),
    *_refuted(
        "deposits",
        LOSS,
        "DEPOSIT_LEFT_OUT",
        "DEPOSIT_AFTER_UNLOCK",
        "SCAN_BEFORE_LOCK",
        "OPENING_DROPS",
        "FAILED_OPENING_FORGETS",
        "DEPOSIT_REPLACED",
    ),
    # I3 where an exchange is two instructions.
    *_holds("exclusive", LOSS),
    *_refuted("exclusive", LOSS, "FENCE_LEFT_OUT"),
    # I5: what was taken and not handed out.
    *_holds("owed", LOSS),
    *_refuted(
        "owed",
        LOSS,
        "ANSWER_IS_DROPPED",
        "OWED_IS_REPLACED",
        "OWED_IS_COPIED_THEN_ZEROED",
        "FLAG_BEFORE_PAGES_ALONE",
        "PAGES_BEFORE_FLAG_IS_TAKEN",
    ),
    # I5 and I6: what the library keeps about KVM's rings.
    *_holds("ring_log", LOSS, TRUTH),
    *_refuted(
        "ring_log",
        LOSS,
        "KICK_LEFT_OUT",
        "KICK_NOT_WAITED_FOR",
        "KICK_AFTER_DRAIN",
        "RESET_FAILURE_IGNORED",
        "OVERFLOW_IGNORED",
        "OVERFLOW_REPORTED_ONCE",
        "TAKEN_IS_DROPPED",
    ),
    *_refuted("ring_log", TRUTH, "RECORD_AFTER_RESET", "COUNTED_BEFORE_RESET", "OUTSTANDING_IS_STUCK"),
    # The end of a migration.
    *_holds("commit", BOTH, NEITHER, KEPT),
    *_refuted(
        "commit",
        BOTH,
        "RUN_WHEN_COMPLETE",
        "RESUME_WITHOUT_ANSWER",
        "RECORD_AFTER_RUN",
        "STRANGER_IS_BELIEVED",
        "REFUSES_AND_LISTENS",
        "RESTART_RESUMES",
        "RESUME_AFTER_DONE",
    ),
    *_refuted("commit", KEPT, "RUN_BEFORE_HAVE", "HAVE_BEFORE_DURABLE", "DROPPED_WHEN_BROKEN"),
    *_refuted("commit", NEITHER, "REFUSAL_UNRECORDED"),
    # Several channels are one line.
    *_holds("channels", KEPT),
    *_refuted(
        "channels",
        KEPT,
        "HAVE_AFTER_ONE_END",
        "ROUND_ENDS_WITH_ONE",
        "PAGES_CHANGE_CHANNELS",
        "OLD_CHANNEL_IS_READ_ON",
        "APPLIED_OF_ONE_FOR_ALL",
    ),
    # A frame that arrives damaged.
    *_holds("channels", KEPT, macros=("DAMAGED",), variant="damaged"),
    *_refuted("channels", KEPT, "DAMAGE_TAKES_NOTHING_BACK", macros=("DAMAGED",)),
    # A copy that runs before it has everything.
    *_holds("postcopy", LOSS, BOTH, NEITHER),
    *_refuted("postcopy", BOTH, "LOST_LINE_REVIVES_THE_SOURCE", "READY_COPY_RUNS", "GIVES_UP_WHILE_IT_RUNS"),
    *_refuted("postcopy", LOSS, "GUARD_ENDS_WITH_THE_LINE"),
    *_refuted("postcopy", NEITHER, "SENT_COUNTS_AS_APPLIED"),
    # One that runs when it has everything.
    *_holds("postcopy", LOSS, BOTH, NEITHER, macros=("FILLED",), variant="filled first"),
    *_refuted("postcopy", BOTH, "STARTS_WHILE_IT_FILLS", "RUNS_BEFORE_IT_IS_RECORDED", macros=("FILLED",)),
    *_refuted("postcopy", NEITHER, "GIVEN_UP_WHEN_FILLED", "RECORDED_AS_RUNNING", macros=("FILLED",)),
)
