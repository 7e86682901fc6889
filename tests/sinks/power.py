"""What tests of power cuts share: writers of snapshots, a model of a disk, and what must hold after each cut."""

import os

import numpy as np

import dirtylog as dl
from dirtylog.sinks._bytes import pageio
from dirtylog.sinks.snapshot import (
    copying,
    flatten,
    merge,
    overlay,
    prune,
    rebase,
    removal,
    restore,
    save,
    staged,
)

SECTOR = 512
NPAGES = 8


class Disk:
    """A model: records what is done to the files of one directory; stands in for `os` in the modules that do it.

    What was written to a file is on the disk once that file was synced; before, each of its sectors may be or not. What
    was done to the directory is there once the directory was synced; before, as much of it as a journal has got to, or,
    on a disk without one, each of its entries on its own.
    """

    def __init__(self, directory):
        self.directory = str(directory)
        self.start = {}
        self.contents = {}
        for number, entry in enumerate(sorted(os.scandir(directory), key=lambda each: each.name)):
            self.start[entry.name] = number
            with open(entry.path, "rb") as file:
                self.contents[number] = file.read()
        self.operations = []
        self.files = {}
        # What must be there from some operation on.
        self.returned = {}

    def patch(self, monkeypatch):
        monkeypatch.setattr(staged, "os", self)
        monkeypatch.setattr(removal, "os", self)
        monkeypatch.setattr(pageio, "os", self)
        monkeypatch.setattr(staged, "rename_noreplace", self.rename_noreplace)
        for module in (copying, overlay):
            monkeypatch.setattr(module, "write_extents", self.write_extents)

    def __getattr__(self, name):
        return getattr(os, name)

    def own(self, path):
        directory, name = os.path.split(os.fspath(path))
        return name if directory == self.directory else None

    def open(self, path, flags, *mode):
        descriptor = os.open(path, flags, *mode)
        name = self.own(path)
        if os.fspath(path) == self.directory:
            self.files[descriptor] = None
        elif name is not None and flags & os.O_CREAT:
            number = len(self.contents)
            self.contents[number] = b""
            self.files[descriptor] = number
            self.did(("entry", {name: number}))
        return descriptor

    def did(self, operation):
        self.operations.append(operation)

    def close(self, descriptor):
        self.files.pop(descriptor, None)
        os.close(descriptor)

    def ftruncate(self, descriptor, size):
        os.ftruncate(descriptor, size)
        self.did(("size", self.files[descriptor], size))

    def pwrite(self, descriptor, data, offset):
        done = os.pwrite(descriptor, data, offset)
        self.did(("write", self.files[descriptor], offset, bytes(data[:done])))
        return done

    def write_extents(self, descriptor, part, extents, *, packed, name):
        at = 0
        for offset, length in extents.tolist():
            os.pwrite(descriptor, part[at : at + length], offset)
            self.did(("write", self.files[descriptor], offset, bytes(part[at : at + length])))
            at += length

    def fsync(self, descriptor):
        if descriptor not in self.files:
            return  # of a file in another directory
        number = self.files[descriptor]
        self.did(("sync", number) if number is not None else ("sync directory",))

    def rename(self, source, target):
        os.rename(source, target)
        if self.own(target) is not None:
            self.did(("rename", self.own(source), self.own(target)))

    rename_noreplace = rename

    def unlink(self, path):
        os.unlink(path)
        if self.own(path) is not None:
            self.did(("entry", {self.own(path): None}))

    def must_have(self, *names):
        """Say that a call has returned for these."""
        for name in names:
            self.returned.setdefault(name, len(self.operations))

    # ---- after a cut ------------------------------------------------------------------------------------------------

    def cuts(self, rng, torn):
        """Yield ``(operations done, {name: bytes})`` for each moment and each state that the disk may be in then."""
        for done in range(len(self.operations) + 1):
            for names in self._names(done, rng, torn):
                for how in ("lost", "kept", *["torn"] * torn):
                    found = {name: self._content(number, done, how, rng) for name, number in names.items()}
                    yield done, found

    def _names(self, done, rng, torn):
        synced, pending = dict(self.start), []
        entries = dict(self.start)
        for operation in self.operations[:done]:
            if operation[0] == "rename":
                change = {operation[1]: None, operation[2]: entries[operation[1]]}
            elif operation[0] == "entry":
                change = operation[1]
            elif operation[0] == "sync directory":
                synced, pending = dict(entries), []
                continue
            else:
                continue
            entries.update(change)
            pending.append(change)
        for until in range(len(pending) + 1):
            journal = dict(synced)
            for change in pending[:until]:
                journal.update(change)
            yield {name: number for name, number in journal.items() if number is not None}
        last = {name: number for change in pending for name, number in change.items()}
        for _ in range(torn if len(last) > 1 else 0):
            some = {**synced, **{name: number for name, number in last.items() if rng.random() < 0.5}}
            yield {name: number for name, number in some.items() if number is not None}

    def _content(self, number, done, how, rng):
        content, pending = bytearray(self.contents[number]), []
        for operation in self.operations[:done]:
            if len(operation) < 2 or operation[1] != number:
                continue
            if operation[0] == "sync":
                for each in pending:
                    self._apply(content, each)
                pending = []
            elif operation[0] in ("size", "write"):
                pending.append(operation)
        for each in pending:
            if how == "kept":
                self._apply(content, each)
            elif how == "torn":
                self._tear(content, each, rng)
        return bytes(content)

    @staticmethod
    def _apply(content, operation):
        end = operation[2] + (len(operation[3]) if operation[0] == "write" else 0)
        content.extend(bytes(max(end - len(content), 0)))
        if operation[0] == "size":
            del content[operation[2] :]
        else:
            content[operation[2] : end] = operation[3]

    def _tear(self, content, operation, rng):
        if operation[0] == "size":
            if rng.random() < 0.9:
                self._apply(content, operation)
            return
        for at in range(0, len(operation[3]), SECTOR):
            if rng.random() < 0.5:
                self._apply(content, ("write", operation[1], operation[2] + at, operation[3][at : at + SECTOR]))


def same(found, wanted):
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all((found[name] == wanted[name]).all() for name in wanted)
    return bool((found == wanted).all())


def check(disk, memory, directory, *, torn, seed=0):
    """Every snapshot of every disk restores to one of `memory`, and those that calls returned for are there."""
    rng = np.random.default_rng(seed)
    seen = {}
    there = {}
    directory.mkdir()
    for done, image in disk.cuts(rng, torn):
        visible = {name: content for name, content in image.items() if not name.startswith(".")}
        missing = [name for name, since in disk.returned.items() if since <= done and name not in visible]
        assert not missing, f"{missing} returned, and a cut after operation {done} takes it back"
        state = frozenset((name, hash(content)) for name, content in visible.items())
        if state in seen:
            continue
        seen[state] = done
        for name in [*there]:
            if visible.get(name) != there[name]:
                os.unlink(directory / name)
                del there[name]
        for name, content in visible.items():
            if name not in there:
                (directory / name).write_bytes(content)
                there[name] = content
        for name in visible:
            found = restore(directory / name)
            assert any(same(found, each) for each in memory[name]), f"{name} after operation {done}"
    return len(seen)


def chain(make_tree, directory):
    directory.mkdir()
    tree = make_tree(directory, npages=NPAGES)
    tree.line("a", "b", "c", "d")
    tree.diff("x", "b")
    tree.diff("y", "x")
    return tree


def do_save(tree, memory):
    tree.sync = True
    tree.full("new")
    yield "new"
    tree.diff("next", "new")
    yield "next"
    memory["y"] = [tree.memory["y"], tree.memory["new"]]
    save(tree.directory / "y", tree.memory["new"], replace=True)


def do_rebase(tree, memory):
    memory["c"] = [tree.memory["c"], tree.memory["d"]]
    rebase(tree.directory / "c", tree.directory / "d")
    yield from ()


def do_flatten(tree, memory):
    flatten(tree.directory / "b")
    flatten(tree.directory / "d")
    flatten(tree.directory / "b")
    yield from ()


def do_merge(tree, memory):
    merge(tree.directory / "x", tree.directory / "y")
    yield from ()
    merge(tree.directory / "c", tree.directory / "d", keep=True)


def do_prune(tree, memory):
    prune(tree.directory, keep_last=3)
    prune(tree.directory, keep_last=1)
    yield from ()


WORKS = {"save": do_save, "rebase": do_rebase, "flatten": do_flatten, "merge": do_merge, "prune": do_prune}
# What no step of these removes.
STAY = {"save": "abcdxy", "rebase": "abcdxy", "flatten": "abcdxy", "merge": "abcdy", "prune": "y"}


def run(work, tree, disk, monkeypatch):
    """Let a disk record what one of `WORKS` does; return what each snapshot may restore to."""
    memory = {}
    with monkeypatch.context() as patch:
        disk.patch(patch)
        disk.must_have(*STAY[work])
        for name in WORKS[work](tree, memory):
            disk.must_have(name)
    return {**{name: [each] for name, each in tree.memory.items()}, **memory}


def run_checkpoints(steps, disk, monkeypatch):
    """Let a disk record what a checkpoint of so many steps does; return what each snapshot must restore to."""
    w, b = np.zeros(4000), np.zeros(10, np.int64)
    memory = {}
    with monkeypatch.context() as patch:
        disk.patch(patch)
        disk.must_have()
        with dl.Checkpoint(disk.directory, {"w": w, "b": b}, keep=2) as checkpoint:
            for step in range(steps):
                w[step * 37 % 4000] = b[:] = step
                name = os.path.basename(checkpoint.save(step=step).path)
                memory[name] = [{"w": w.copy(), "b": b.copy()}]
    disk.must_have(name)
    return memory
