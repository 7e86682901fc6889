"""Run one thread of AArch64 assembly for every value that its loads may find; note what it does to shared memory."""

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

MASK = (1 << 64) - 1
STACK = 1 << 40  # private memory begins here, a long way above what is shared
MOST_STEPS = 400


class UnknownInstruction(ValueError):
    """The assembly has something that is not modelled; nothing can be said of it."""


class Event(NamedTuple):
    """One access to shared memory, or one barrier.

    Attributes
    ----------
    kind : str
        ``R`` or ``W``; ``F`` for a barrier.
    place : int
        Address; 0 for a barrier.
    value : int
        What was read or written.
    order : str
        Of an access: ``A`` acquire, ``Q`` acquire as LDAPR has it, ``L`` release, or nothing. Of a barrier: ``full``,
        ``ld``, ``st`` or ``isb``.
    address, data, control : frozenset of int
        Reads, by their numbers in the thread, on which the address, the value and being here at all depend.
    partner : int
        Of a write: the read that it is one read-modify-write with; -1: none.
    at_once : bool
        One instruction does both, so that nothing of the thread can come between.
    """

    kind: str
    place: int
    value: int
    order: str
    address: frozenset[int] = frozenset()
    data: frozenset[int] = frozenset()
    control: frozenset[int] = frozenset()
    partner: int = -1
    at_once: bool = False


class Trace(NamedTuple):
    """One way through a thread: what it did, and its first register at the end."""

    events: tuple[Event, ...]
    returned: int


# What each place may hold.
Values = Mapping[int, frozenset[int]]


class Known(NamedTuple):
    """What a register holds, and the reads that it depends on."""

    value: int
    reads: frozenset[int] = frozenset()


ZERO = Known(0)


@dataclass
class State:
    """A thread on its way."""

    at: int = 0
    registers: dict[str, Known] = field(default_factory=dict)
    private: dict[int, Known] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    flags: tuple[Known, Known] = (ZERO, ZERO)
    control: frozenset[int] = frozenset()
    exclusive: int = -1
    steps: int = 0

    def fork(self) -> "State":
        """Return a copy, to go on with another value."""
        return State(
            self.at, {**self.registers}, {**self.private}, [*self.events], self.flags, self.control, self.exclusive,
            self.steps,
        )  # fmt: skip


CONDITIONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "hi": operator.gt,
    "ls": operator.le,
    "cs": operator.ge,
    "hs": operator.ge,
    "cc": operator.lt,
    "lo": operator.lt,
}
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "and": operator.and_,
    "orr": operator.or_,
    "eor": operator.xor,
    "bic": lambda a, b: a & ~b,
    "orn": lambda a, b: a | ~b,
    "lsl": operator.lshift,
    "lsr": operator.rshift,
}
COUNTED: dict[str, Callable[[int], int]] = {
    "rbit": lambda a: int(f"{a:064b}"[::-1], 2),
    "clz": lambda a: 64 - a.bit_length(),
    "mvn": operator.invert,
    "neg": operator.neg,
}
# What an atomic instruction leaves in memory, of what was there and its operand.
ATOMIC: dict[str, Callable[[int, int], int]] = {
    "swp": lambda _, new: new,
    "ldset": operator.or_,
    "ldclr": lambda old, bits: old & ~bits,
    "ldadd": operator.add,
}
LOADS = {"ldr": "", "ldxr": "", "ldar": "A", "ldaxr": "A", "ldapr": "Q"}
STORES = {"str": "", "stlr": "L"}
STORES_IF_EXCLUSIVE = {"stxr": "", "stlxr": "L"}


def functions(assembly: str) -> dict[str, list[str]]:
    """Return the instructions and labels of each function that a compiler has written."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for raw in assembly.splitlines():
        line = raw.split("//")[0].strip()
        if re.fullmatch(r"[a-z_]\w*:", line):
            lines = found.setdefault(line[:-1], [])
        elif line and not line.startswith("#") and (not line.startswith(".") or line.endswith(":")):
            lines.append(line)
    return found


def _operands(text: str) -> list[str]:
    """Split at commas that no bracket encloses."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text)] if text else []


class Thread:
    """One function, to be run again and again as more values become known.

    Parameters
    ----------
    lines : list of str
        Instructions and labels.
    arguments : sequence of int
        What the first registers hold: addresses.
    """

    def __init__(self, lines: list[str], arguments: tuple[int, ...]) -> None:
        self.labels: dict[str, int] = {}
        self.program: list[tuple[str, list[str]]] = []
        for line in lines:
            if line.endswith(":"):
                self.labels[line[:-1]] = len(self.program)
            else:
                name, _, rest = line.replace("\t", " ").partition(" ")
                self.program.append((name, _operands(rest.strip())))
        self.arguments = arguments

    def traces(self, values: Values) -> Iterator[Trace]:
        """Yield every way through the thread, where a load may find any value that its place may hold."""
        first = State(registers={f"x{i}": Known(value) for i, value in enumerate(self.arguments)})
        first.registers["sp"] = Known(STACK + (1 << 20))
        waiting = [first]
        while waiting:
            state = waiting.pop()
            while state.at < len(self.program):
                name, operands = self.program[state.at]
                if name == "ret":
                    break
                state.steps += 1
                if state.steps > MOST_STEPS:
                    raise UnknownInstruction(f"a loop that does not end within {MOST_STEPS} steps")
                state.at += 1
                others = self.step(state, name, operands, values)
                waiting.extend(others)
            yield Trace(tuple(state.events), self.read(state, "x0").value)

    # ---- registers

    def read(self, state: State, name: str) -> Known:
        """Return what a register holds, or a number that stands in the instruction."""
        if name in ("xzr", "wzr"):
            return ZERO
        if re.fullmatch(r"#?-?(0x)?[\da-f]+", name):
            return Known(int(name.lstrip("#"), 0) & MASK)
        if not re.fullmatch(r"[xw]\d+|sp", name):
            raise UnknownInstruction(f"operand {name}")
        known = state.registers.get(name.replace("w", "x"), ZERO)
        return Known(known.value & 0xFFFFFFFF, known.reads) if name.startswith("w") else known

    def write(self, state: State, name: str, value: int, *sources: Known) -> None:
        """Give a register a value that was made of some others."""
        if not re.fullmatch(r"[xw](\d+|zr)|sp", name):
            raise UnknownInstruction(f"register {name}")
        if name not in ("xzr", "wzr"):
            mask = 0xFFFFFFFF if name.startswith("w") else MASK
            reads = frozenset[int]().union(*(known.reads for known in sources))
            state.registers[name.replace("w", "x")] = Known(value & mask, reads)

    def address(self, state: State, operand: str) -> Known:
        """Return the place that an operand in brackets names."""
        found = re.fullmatch(r"\[(\w+)(?:, *#?(-?\w+)(?:, *lsl #?(\d+))?)?\]", operand)
        if not found:
            raise UnknownInstruction(f"address {operand}")
        base, offset = self.read(state, found[1]), self.read(state, found[2] or "0")
        return Known(base.value + (offset.value << int(found[3] or 0)) & MASK, base.reads | offset.reads)

    # ---- memory

    def load(self, state: State, target: str, where: Known, order: str, values: Values) -> list[State]:
        """Read a place; return a copy of the state for every value but the first."""
        if where.value >= STACK:
            known = state.private.get(where.value, ZERO)
            self.write(state, target, known.value, known, where)
            return []
        number = frozenset([len(state.events)])
        states = []
        for value in sorted(values[where.value]):
            other = state.fork()
            other.events.append(Event("R", where.value, value, order, where.reads, control=state.control))
            self.write(other, target, value, Known(0, number))
            states.append(other)
        state.__dict__.update(states[0].__dict__)
        return states[1:]

    def store(
        self, state: State, source: Known, where: Known, order: str, partner: int = -1, at_once: bool = False
    ) -> None:
        """Write a place."""
        if where.value >= STACK:
            state.private[where.value] = Known(source.value, source.reads | where.reads)
            return
        state.events.append(
            Event("W", where.value, source.value, order, where.reads, source.reads, state.control, partner, at_once)
        )

    # ---- one instruction

    def step(self, state: State, name: str, operands: list[str], values: Values) -> list[State]:
        """Do one instruction; return the other ways in which it may end."""
        if name in LOADS:
            # An exclusive pair that fails is tried again, and what it has read is forgotten: only the last is here.
            exclusive = len(state.events)
            others = self.load(state, operands[0], self.address(state, operands[1]), LOADS[name], values)
            if name in ("ldxr", "ldaxr"):
                for each in (state, *others):
                    each.exclusive = exclusive
            return others
        if name in STORES:
            self.store(state, self.read(state, operands[0]), self.address(state, operands[1]), STORES[name])
        elif name == "stp":
            where = self.address(state, operands[2])
            for i in (0, 1):
                self.store(state, self.read(state, operands[i]), Known(where.value + 8 * i, where.reads), "")
        elif name in STORES_IF_EXCLUSIVE:
            where = self.address(state, operands[2])
            self.store(state, self.read(state, operands[1]), where, STORES_IF_EXCLUSIVE[name], state.exclusive)
            self.write(state, operands[0], 0)
        elif found := re.fullmatch(r"(swp|ldset|ldclr|ldadd)(a?)(l?)", name):
            return self.atomic(state, found.groups(), operands, values)
        elif name in ("dmb", "isb"):
            barrier = "isb" if name == "isb" else {"ish": "full", "ishld": "ld", "ishst": "st"}[operands[0]]
            state.events.append(Event("F", 0, 0, barrier, control=state.control))
        else:
            self.compute(state, name, operands)
        return []

    def atomic(self, state: State, name: tuple[str, ...], operands: list[str], values: Values) -> list[State]:
        """Read, change and write a place by one instruction."""
        kind, acquire, release = name
        where, operand, number = self.address(state, operands[2]), self.read(state, operands[0]), len(state.events)
        # Whose old value goes nowhere acquires nothing.
        order = "A" if acquire and operands[1] not in ("xzr", "wzr") else ""
        others = self.load(state, operands[1], where, order, values)
        for each in (state, *others):
            new = ATOMIC[kind](each.events[number].value, operand.value) & MASK
            # A swap stores its operand, whatever was there.
            reads = operand.reads if kind == "swp" else operand.reads | {number}
            self.store(each, Known(new, reads), where, "L" if release else "", number, True)
        return others

    def compute(self, state: State, name: str, operands: list[str]) -> None:
        """Do an instruction that stays within registers, or goes elsewhere."""
        sources = self.sources(state, operands[1:])
        flagging = name.removesuffix("s")
        if name == "mov":
            self.write(state, operands[0], sources[0].value, sources[0])
        elif name in COUNTED:
            self.write(state, operands[0], COUNTED[name](sources[0].value) & MASK, sources[0])
        elif (name in ARITHMETIC or (flagging in ("and", "sub") and name != flagging)) and len(sources) == 2:
            result = ARITHMETIC[flagging if name not in ARITHMETIC else name](sources[0].value, sources[1].value) & MASK
            if name not in ARITHMETIC:
                zero = name == "ands"
                state.flags = (
                    (Known(result, sources[0].reads | sources[1].reads), ZERO) if zero else (sources[0], sources[1])
                )
            self.write(state, operands[0], result, *sources)
        elif name == "bfi":
            kept, (source, low, width) = self.read(state, operands[0]), sources
            mask = (1 << width.value) - 1 << low.value
            self.write(state, operands[0], kept.value & ~mask | source.value << low.value & mask, kept, source)
        elif name in ("cmp", "tst"):
            first = self.read(state, operands[0])
            both = Known(first.value & sources[0].value, first.reads | sources[0].reads)
            state.flags = (first, sources[0]) if name == "cmp" else (both, ZERO)
        elif name in ("csel", "cset"):
            one, other = state.flags
            holds = CONDITIONS[operands[-1]](one.value, other.value)
            choice = sources[not holds].value if name == "csel" else int(holds)
            self.write(state, operands[0], choice, *sources, one, other)
        else:
            self.jump(state, name, operands)

    def sources(self, state: State, operands: list[str]) -> list[Known]:
        """Return what an instruction computes with; a shift belongs to the register before it."""
        found: list[Known] = []
        for operand in operands:
            if shift := re.fullmatch(r"(lsl|lsr) #?(\d+)", operand):
                found[-1] = Known(ARITHMETIC[shift[1]](found[-1].value, int(shift[2])) & MASK, found[-1].reads)
            elif operand not in self.labels and operand not in CONDITIONS:
                found.append(self.read(state, operand))
        return found

    def jump(self, state: State, name: str, operands: list[str]) -> None:
        """Go elsewhere, perhaps; all that follows then depends on what decided it."""
        tested = ZERO
        if name == "b":
            taken = True
        elif name in ("cbz", "cbnz"):
            tested = self.read(state, operands[0])
            taken = (tested.value == 0) == (name == "cbz")
        elif name in ("tbz", "tbnz"):
            tested = self.read(state, operands[0])
            taken = (tested.value >> int(operands[1].lstrip("#")) & 1 == 0) == (name == "tbz")
        elif (condition := name.removeprefix("b").removeprefix(".")) in CONDITIONS and name.startswith("b"):
            one, other = state.flags
            tested = Known(0, one.reads | other.reads)
            taken = CONDITIONS[condition](one.value, other.value)
        else:
            raise UnknownInstruction(f"{name} {', '.join(operands)}")
        state.control |= tested.reads
        if taken:
            state.at = self.labels[operands[-1]]
