"""What tests of snapshots share: trees of them, and the memory that each must restore to."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from dirtylog import DirtyPages
from dirtylog.sinks.snapshot import catalog, restore, save, save_diff, verify
from dirtylog.sinks.snapshot.layout import Layout

from ..qemu import machine, machines

__all__ = ["machine", "machines"]


def names(directory):
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))


@pytest.fixture
def mixed_layouts(monkeypatch):
    """Write every second diff as before there were packed ones: chains are of both."""
    turns = itertools.cycle([Layout.PACKED, Layout.PLAIN])
    monkeypatch.setattr(Layout, "of", staticmethod(lambda kind: next(turns) if kind == "diff" else Layout.PLAIN))


class Tree:
    """Snapshots in a directory, and the memory that each of them must restore to."""

    def __init__(self, directory, seed=0, npages=32, sync=False):
        self.directory = Path(directory)
        self.rng = np.random.default_rng(seed)
        self.memory = {}
        self.npages = npages
        self.sync = sync

    def full(self, name):
        memory = self.rng.integers(0, 256, self.npages * 4096 - 100, np.uint8)
        save(self.directory / name, memory, sync=self.sync)
        self.memory[name] = memory

    def diff(self, name, parent):
        memory = self.memory[parent].copy()
        pages = self.rng.choice(self.npages, 5, replace=False)
        for page in pages:
            memory[page * 4096 : page * 4096 + 4096] = self.rng.integers(0, 256) * (self.rng.random() < 0.8)
        held = DirtyPages.from_indices(pages, self.npages)
        save_diff(self.directory / name, memory, held, parent=self.directory / parent, sync=self.sync)
        self.memory[name] = memory

    def line(self, *names):
        self.full(names[0])
        for parent, name in itertools.pairwise(names):
            self.diff(name, parent)

    def names(self):
        return names(self.directory)

    def check(self, *least):
        """Whatever is there restores to what it was, and is sound by its footers too; `least` are there."""
        there = self.names()
        assert set(least) <= set(there)
        for name in there:
            assert (restore(self.directory / name) == self.memory[name]).all(), name
            verify(self.directory / name)
        assert [entry.problem for entry in catalog(self.directory)] == [None] * len(there)
        return there


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@pytest.fixture
def make_tree():
    return Tree
