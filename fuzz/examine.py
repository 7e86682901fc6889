"""One input, one verdict: let a target read it under the guard, and its oracle judge what came of it."""

import os
from pathlib import Path

# Before pyarrow is imported: its other allocators reserve address space ahead of need, and that is what is limited.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

from fuzz.files import Footer, Snapshot, TraceFile
from fuzz.guard import Guard
from fuzz.sets import Pickle, Ring, SharedFile, Words
from fuzz.streams import Answers, Device, Migration, Monitor, Nbd, Postcopy
from fuzz.target import Target

__all__ = ["CORPUS", "TARGETS", "Examiner", "corpus_of"]

CORPUS = Path(__file__).parent / "corpus"
TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (
        Words,
        Pickle,
        SharedFile,
        Ring,
        Footer,
        Snapshot,
        TraceFile,
        Migration,
        Postcopy,
        Answers,
        Nbd,
        Monitor,
        Device,
    )
}


def corpus_of(name: str) -> list[bytes]:
    """Return the inputs that are kept for a target, in the order of their names."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]


class Examiner:
    """A target under a guard."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.guard: Guard | None = None
        # Whatever is imported on first use is imported now.
        self.seeds = list(target.seeds())
        for seed in self.seeds:
            if not self(seed):
                raise RuntimeError(f"{target.name}: a seed is refused: {seed!r:.200}")
        self.guard = Guard()

    def __call__(self, data: bytes) -> bool:
        """Say whether an input is accepted; raise what is wrong with the answer."""
        target = self.target
        prepared = target.prepare(data)
        try:
            if self.guard is None:
                answer = target.read(prepared)
            else:
                with self.guard.armed(target.directory, writable=target.writable):
                    answer = target.read(prepared)
        except target.refusals:
            return False
        target.judge(prepared, answer)
        return True
