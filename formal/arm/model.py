"""The architecture's memory model: which executions of some threads it allows.

The rules are those of the Arm Architecture Reference Manual, section B2.3, in the form that its authors publish for
herd7: coherence at each place, atomicity of a read-modify-write, and no cycle in "ordered before". Accesses are of one
size, to memory that is not executed; nobody walks page tables.
"""

import functools
import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import NamedTuple

from formal.arm.code import Event, Thread, Trace


class Outcome(NamedTuple):
    """How an execution ends: what each place holds, and what each thread returns."""

    memory: Mapping[int, int]
    returned: tuple[int, ...]


def _successors(events: tuple[Event, ...], write: int) -> Iterator[int]:
    """Yield the reads of a thread that come after its write of a place, and before its next one."""
    for later in range(write + 1, len(events)):
        if events[later].place == events[write].place:
            if events[later].kind == "W":
                return
            if events[later].kind == "R":
                yield later


def local_order(events: tuple[Event, ...]) -> set[tuple[int, int]]:
    """Return the pairs of events that a thread does in the order in which they stand."""
    pairs: set[tuple[int, int]] = set()
    for j, later in enumerate(events):
        # Dependencies.
        pairs |= {(i, j) for i in later.address | later.data}
        if later.kind == "W":
            pairs |= {(i, j) for i in later.control}
            pairs |= {(i, j) for between in events[:j] for i in between.address}
            pairs |= {(i, k) for i in later.address | later.data for k in _successors(events, j)}
        if later.kind == "F" and later.order == "isb":
            known = later.control.union(*(between.address for between in events[:j]))
            pairs |= {(i, k) for i in known for k in range(j + 1, len(events)) if events[k].kind == "R"}
        # Read-modify-writes.
        if later.partner >= 0:
            pairs.add((later.partner, j))
            pairs |= {(j, k) for k in _successors(events, j) if events[k].order in ("A", "Q")}
            # One instruction that acquires and releases: its write, too, comes before all that follows.
            if later.at_once and later.order == "L" and events[later.partner].order == "A":
                pairs |= {(j, k) for k in range(j + 1, len(events))}
        # Barriers, acquires and releases.
        before, after = range(j), range(j + 1, len(events))
        if later.kind == "F" and later.order == "full":
            pairs |= set(itertools.product(before, after))
        elif later.kind == "F" and later.order == "ld":
            pairs |= {(i, k) for i in before if events[i].kind == "R" for k in after}
        elif later.kind == "F" and later.order == "st":
            pairs |= {(i, k) for i in before if events[i].kind == "W" for k in after if events[k].kind == "W"}
        elif later.order in ("A", "Q"):
            pairs |= {(j, k) for k in after}
        elif later.order == "L":
            pairs |= {(i, j) for i in before}
            pairs |= {(j, k) for k in after if events[k].order == "A"}
    return pairs


def _is_acyclic(edges: Iterable[tuple[Hashable, Hashable]]) -> bool:
    into: dict[Hashable, int] = {}
    out: dict[Hashable, list[Hashable]] = {}
    for i, j in edges:
        out.setdefault(i, []).append(j)
        out.setdefault(j, [])
        into[j] = into.get(j, 0) + 1
    free = [i for i in out if not into.get(i)]
    for i in free:
        for j in out[i]:
            into[j] -= 1
            if not into[j]:
                free.append(j)
    return len(free) == len(out)


# An event among those of all threads: the thread, and its number there. Thread -1 made what was there at the start.
Name = tuple[int, int]


class _Way(NamedTuple):
    """One coherent way in which a place is written and read: the edges between threads, and its last value."""

    edges: frozenset[tuple[Name, Name]]
    last: int


# What each thread does to one place: number, kind, value and partner of its events.
_Accesses = tuple[tuple[tuple[int, str, int, int], ...], ...]


@functools.lru_cache(maxsize=1 << 16)
def _ways(initial: int, threads: _Accesses) -> tuple[_Way, ...]:
    """Return the ways that coherence and atomicity allow at one place."""
    first = (-1, 0)
    events = {(t, event[0]): event for t, thread in enumerate(threads) for event in thread}
    written = {first: initial} | {name: value for name, (_, kind, value, _) in events.items() if kind == "W"}
    reads = [name for name, (_, kind, *_) in events.items() if kind == "R"]
    sources = [[w for w, value in written.items() if value == events[r][2]] for r in reads]
    if not all(sources):
        return ()
    partners = {(w[0], events[w][3]): w for w in written if w != first and events[w][3] >= 0}
    program = {(i, j) for i in events for j in events if i[0] == j[0] and i[1] < j[1]}
    found = []
    for order in itertools.permutations([w for w in written if w != first]):
        rank = {w: n for n, w in enumerate((first, *order))}
        coherence = {(v, w) for v in written for w in written if rank[v] < rank[w]}
        for chosen in itertools.product(*sources):
            from_write = list(zip(chosen, reads, strict=True))
            # Nobody else writes between the two halves of a read-modify-write.
            if any(rank[partners[r]] != rank[v] + 1 for v, r in from_write if r in partners):
                continue
            from_read = {(r, w) for v, r in from_write for w in written if rank[v] < rank[w]}
            edges = coherence | from_read | set(from_write)
            if _is_acyclic(edges | program):
                found.append(_Way(frozenset((i, j) for i, j in edges if i[0] != j[0]), written[(first, *order)[-1]]))
    return tuple(found)


def all_traces(threads: list[Thread], initial: Mapping[int, int]) -> list[list[Trace]]:
    """Run each thread for every value that a place may hold.

    A value is made of values that were written before it, so there are no more generations of them than writes.
    """
    values = {place: frozenset([value]) for place, value in initial.items()}
    for generation in itertools.count():
        traces = [list(thread.traces(values)) for thread in threads]
        writes = sum(max(sum(event.kind == "W" for event in trace.events) for trace in each) for each in traces)
        more = dict(values)
        for trace in itertools.chain(*traces):
            for event in trace.events:
                if event.kind == "W":
                    more[event.place] |= {event.value}
        if more == values or generation == writes:
            break
        values = more
    return traces


def outcomes(threads: list[Thread], initial: Mapping[int, int]) -> Iterator[Outcome]:
    """Yield the outcome of every execution that the architecture allows; the same one perhaps more than once."""
    traces = [
        [(trace, local_order(trace.events), [_accesses(trace, place) for place in initial]) for trace in each]
        for each in all_traces(threads, initial)
    ]
    for combination in itertools.product(*traces):
        places = []
        for number, value in enumerate(initial.values()):
            places.append(_ways(value, tuple(accesses[number] for _, _, accesses in combination)))
            if not places[-1]:
                break
        else:
            local = {((t, i), (t, j)) for t, (_, pairs, _) in enumerate(combination) for i, j in pairs}
            for ways in itertools.product(*places):
                if _is_acyclic(local.union(*(way.edges for way in ways))):
                    memory = {place: way.last for place, way in zip(initial, ways, strict=True)}
                    yield Outcome(memory, tuple(trace.returned for trace, _, _ in combination))


def _accesses(trace: Trace, place: int) -> tuple[tuple[int, str, int, int], ...]:
    """Return what a thread does to one place."""
    return tuple(
        (i, event.kind, event.value, event.partner) for i, event in enumerate(trace.events) if event.place == place
    )
