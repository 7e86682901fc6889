"""What is checked for Arm: the threads of each test, how memory begins, what must never come out; and where it may."""

from collections.abc import Callable
from dataclasses import dataclass

from formal.arm.model import Outcome

# What the compiler is asked for: atomics as a pair of exclusive instructions, or as one instruction each.
MACHINES = {"exclusive pairs": "armv8-a", "LSE": "armv8.1-a"}
EXCLUSIVE, LSE = MACHINES

PAGES, WORDS, SUMMARY, TOP = 0x1000, 0x2000, 0x3000, 0x4000
FOREIGN = (PAGES, WORDS, 0)

Verdict = Callable[[Outcome], bool]


@dataclass(frozen=True)
class Test:
    """One litmus test.

    Attributes
    ----------
    name : str
        What it is about; a wrong order by the mistake in it.
    threads : tuple of str
        Functions of ``threads.c``; the last one harvests.
    dirty : str
        How the bitmap begins: ``clean``; ``set``, the first page and its line are marked already; ``line``, the summary
        has the line still, and all of its pages have been cleared; ``top``, the top has its bit, and the summary none.
    bad : callable
        Whether an outcome is one that must not be.
    may_be : tuple of str
        Machines on which the outcome is possible: none where the order is right.
    foreign : bool
        There is no summary.
    third : bool
        There is a third level over the summary, one page, and one leaf.
    """

    name: str
    threads: tuple[str, ...]
    bad: Verdict
    dirty: str = "clean"
    may_be: tuple[str, ...] = ()
    foreign: bool = False
    third: bool = False

    def initial(self) -> dict[int, int]:
        """Return what memory holds at the start."""
        leaf, line = self.dirty == "set", self.dirty in ("set", "line")
        if self.third:
            top = self.dirty != "clean"
            return {PAGES: 0, PAGES + 8: 0, WORDS: int(leaf), SUMMARY: int(line), TOP: int(top)}
        memory = {PAGES: 0, PAGES + 8: 0, WORDS: int(leaf), WORDS + 8: 0}
        return memory if self.foreign else {**memory, SUMMARY: int(line)}


def lost(outcome: Outcome) -> bool:
    """Whether a page was written, and neither the copy has it nor will the next harvest look there."""
    memory, report = outcome.memory, outcome.returned[-1]
    looked_at = memory.get(SUMMARY, 1) & 1
    return any(
        memory[PAGES + 8 * page] and report >> 2 * page & 3 != 3 and not (looked_at and memory[WORDS + 8 * page] & 1)
        for page in (0, 1)
    )


def lost_below_the_top(outcome: Outcome) -> bool:
    """Whether page 0 was written, and neither the copy has it nor will the next harvest come to it from the top."""
    memory = outcome.memory
    reached = memory[TOP] & memory[SUMMARY] & memory[WORDS] & 1
    return bool(memory[PAGES]) and outcome.returned[-1] != 3 and not reached


def late(outcome: Outcome) -> bool:
    """Whether a harvest that began after a mark had returned has not got it."""
    return outcome.returned[-1] == 2


def _right(name: str, *threads: str, foreign: bool = False) -> list[Test]:
    starts = ("clean", "set") if foreign else ("clean", "set", "line")
    return [Test(f"{name}, {start}", threads, lost, start, foreign=foreign) for start in starts]


def _wrong(
    name: str, *threads: str, dirty: str = "set", where: tuple[str, ...] = tuple(MACHINES), foreign: bool = False
) -> list[Test]:
    return [Test(name, threads, lost, dirty, where, foreign)]


def _third(name: str, *threads: str, starts: tuple[str, ...], where: tuple[str, ...] = ()) -> list[Test]:
    return [
        Test(f"{name}, {start}" if len(starts) > 1 else name, threads, lost_below_the_top, start, where, third=True)
        for start in starts
    ]


TESTS: tuple[Test, ...] = (
    # I3, I4: one marker.
    *_right("mark", "mark", "harvest"),
    *_right("batch", "batch", "harvest"),
    *_right("batch of two words", "batch_of_both", "harvest"),
    *_right("range", "range", "harvest"),
    *_right("range of two words", "range_of_both", "harvest"),
    # Of one word, of memory without a summary, and cleared before it is copied.
    *_right("mark, part", "mark", "harvest_part"),
    *_right("batch, part", "batch", "harvest_part"),
    *_right("mark, foreign", "mark", "harvest", foreign=True),
    *_right("batch, foreign", "batch", "harvest", foreign=True),
    *_right("range, foreign", "range", "harvest", foreign=True),
    *_right("mark, clear", "mark", "clear"),
    *_right("batch, clear", "batch", "clear"),
    *_right("range, clear", "range", "clear"),
    # Two markers, of one word and of two words of one line.
    *_right("two marks of a word", "mark", "mark", "harvest"),
    *_right("mark and range of a word", "mark", "range", "harvest"),
    *_right("two marks of a line", "mark", "mark_second", "harvest"),
    *_right("batch and mark of a line", "batch", "mark_second", "harvest"),
    *_right("range and mark of a line", "range", "mark_second", "harvest"),
    # I4: what has returned is in the next harvest, whoever else is on the way to the summary.
    Test("mark, told", ("mark", "mark_and_tell", "harvest_until_told"), late, "line"),
    Test("batch, told", ("mark", "batch_and_tell", "harvest_until_told"), late, "line"),
    # An acquire load as newer compilers make it, of a processor that has it.
    *_right("batch by LDAPR", "batch_by_ldapr", "harvest"),
    # One mistake each.
    *_wrong("test instead of fetch-or", "test_before_mark", "harvest"),
    *_wrong("relaxed fetch-or", "mark_relaxed", "harvest"),
    *_wrong("batch without fence", "batch_without_fence", "harvest"),
    Test(
        "batch without acquire", ("mark", "batch_without_acquire", "harvest_until_told"), late, "line", tuple(MACHINES)
    ),
    *_wrong("range without fence", "range_without_fence", "harvest"),
    *_wrong("range relaxed", "range_relaxed", "harvest"),
    *_wrong("summary loaded early", "summary_loaded_early", "harvest"),
    *_wrong("leaves first", "mark", "harvest_leaves_first", dirty="line"),
    *_wrong("copy, then zero", "mark", "harvest_copy_then_zero", dirty="clean", foreign=True),
    # Needed where an exchange is two instructions, and nowhere else.
    *_wrong("no fence after the summary", "mark", "harvest_without_summary_fence", dirty="line", where=(EXCLUSIVE,)),
    *_wrong("no fence at the end", "batch", "harvest_without_end", where=(EXCLUSIVE,)),
    *_wrong("no fence after a clear", "batch", "clear_without_end", where=(EXCLUSIVE,)),
    # I4 with a third level.
    *_third("three levels, mark", "mark_three", "harvest_three", starts=("clean", "set", "line", "top")),
    *_third("three levels, batch", "batch_three", "harvest_three", starts=("clean", "set", "line", "top")),
    *_third("three levels, range", "range_three", "harvest_three", starts=("clean", "set", "line", "top")),
    Test(
        "three levels, told",
        ("mark_three", "mark_three_and_tell", "harvest_three_when_told"),
        late,
        "clean",
        third=True,
    ),
    *_third("top loaded relaxed", "top_loaded_relaxed", "harvest_three", starts=("top",), where=(EXCLUSIVE,)),
    *_third("top loaded early", "top_loaded_early", "harvest_three", starts=("top",), where=tuple(MACHINES)),
    Test(
        "top not looked at",
        ("mark_three", "mark_three_and_skip", "harvest_three_when_told"),
        late,
        "clean",
        tuple(MACHINES),
        third=True,
    ),
    *_third("no fence after the top", "mark_three", "harvest_without_top_fence", starts=("top",), where=(EXCLUSIVE,)),
    *_third("summary before the top", "mark_three", "harvest_summary_first", starts=("top",), where=tuple(MACHINES)),
)
