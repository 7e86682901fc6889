"""Diffs over long chains: each looks at as few files as one over a short chain, and what others break is noticed."""

import os

import numpy as np
import pytest

from dirtylog import DirtyPages
from dirtylog.sinks.snapshot import SnapshotError, ancestry, chain, restore, save, save_diff

pytestmark = pytest.mark.usefixtures("mixed_layouts")


class Chain:
    """A chain that grows by a page per diff, and how many files of it are opened for each."""

    def __init__(self, directory, monkeypatch):
        self.directory = directory
        self.memory = np.zeros(8 * 512, np.uint8)
        self.paths = []
        self.opened = 0
        for module, name in ((chain, "open"), (chain.os, "open")):
            monkeypatch.setattr(module, name, self.counting(getattr(module, name, open)), raising=False)

    def counting(self, real):
        def counted(path, *args, **kwargs):
            self.opened += str(path) in self.paths
            return real(path, *args, **kwargs)

        return counted

    def grow(self):
        """Write the next one; return how many files of the chain were opened."""
        path = str(self.directory / f"s{len(self.paths):04d}")
        self.opened = 0
        if self.paths:
            page = len(self.paths) % 8
            self.memory[page * 512] += 1
            pages = DirtyPages.from_indices([page], 8, 512)
            save_diff(path, self.memory, pages, parent=self.paths[-1], sync=False)
        else:
            save(path, self.memory, page_size=512, sync=False)
        self.paths.append(path)
        return self.opened

    def meddle(self, change):
        """Let somebody else change the directory, by a tick of its clock at least."""
        before = os.stat(self.directory).st_mtime_ns
        change()
        while os.stat(self.directory).st_mtime_ns == before:
            (self.directory / "tick").touch()
            (self.directory / "tick").unlink()


def test_a_diff_over_a_long_chain_looks_at_no_more_files_than_one_over_a_short_chain(tmp_path, monkeypatch):
    growing = Chain(tmp_path, monkeypatch)
    opened = [growing.grow() for _ in range(100)]
    assert set(opened[20:]) == {opened[20]}
    # The parent's footer, the parent again before the diff gets its name, and those whose turn it is.
    assert opened[20] == ancestry.CALM + 2
    assert (restore(growing.paths[-1]) == growing.memory).all()


def another(path):
    """Write another snapshot of the same geometry beside one."""
    save(path + ".other", np.ones(8 * 512, np.uint8), page_size=512, sync=False)
    return path + ".other"


@pytest.mark.parametrize("which", [0, 1, 30, 58])
@pytest.mark.parametrize("change", [os.unlink, lambda path: os.replace(another(path), path)])
def test_an_ancestor_that_others_remove_or_replace_is_noticed_at_once(tmp_path, monkeypatch, which, change):
    growing = Chain(tmp_path, monkeypatch)
    for _ in range(60):
        growing.grow()
    growing.meddle(lambda: change(growing.paths[which]))
    with pytest.raises(SnapshotError, match=f"s{which:04d}"):
        growing.grow()


def test_an_ancestor_that_is_cut_in_place_is_noticed_when_its_turn_comes(tmp_path, monkeypatch):
    growing = Chain(tmp_path, monkeypatch)
    for _ in range(60):
        growing.grow()
    os.truncate(growing.paths[30], 600)
    with pytest.raises(SnapshotError, match="s0030"):
        [growing.grow() for _ in range(60 // ancestry.CALM + 1)]


def test_a_very_long_chain_in_a_directory_that_others_change_is_looked_through_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(ancestry, "DISTURBED", 20)
    monkeypatch.setattr(ancestry, "CALM", 2)
    growing = Chain(tmp_path, monkeypatch)
    for _ in range(60):
        growing.grow()
    growing.meddle(lambda: (tmp_path / "note").touch())
    assert [growing.grow() for _ in range(5)] == [22, 22, 22, 4, 4]


def test_two_diffs_over_one_parent_and_many_chains_at_once_are_all_looked_through(tmp_path):
    memory = np.zeros(8 * 512, np.uint8)
    pages = DirtyPages.from_indices([1], 8, 512)
    for number in range(ancestry.MAX_CHAINS + 3):
        save(tmp_path / f"{number}-0", memory, page_size=512, sync=False)
    for step in range(1, 4):
        for number in range(ancestry.MAX_CHAINS + 3):
            for twin in ("", "t"):
                name = tmp_path / f"{number}-{step}{twin}"
                save_diff(name, memory, pages, parent=tmp_path / f"{number}-{step - 1}", sync=False)
    assert len(ancestry._chains) <= ancestry.MAX_CHAINS
    os.unlink(tmp_path / "3-1")
    with pytest.raises(SnapshotError, match="3-1"):
        save_diff(tmp_path / "new", memory, pages, parent=tmp_path / "3-3")
