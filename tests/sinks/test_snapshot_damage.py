"""Damage of every kind, anywhere in any file of a chain: verify finds it, and restoring never hands it out."""

import contextlib
import os

import numpy as np
import pytest

from dirtylog.sinks.snapshot import SnapshotError, restore, verify

pytestmark = pytest.mark.usefixtures("mixed_layouts")

KINDS = ("bit", "hole", "cut", "growth", "moved", "exchanged")


def damage(content, kind, rng):
    """Return the content of a file with one thing wrong with it."""
    size = len(content)
    hurt = bytearray(content)
    at = int(rng.integers(size))
    length = int(min(rng.integers(1, 20_000), size - at))
    if kind == "bit":
        hurt[at] ^= 1 << int(rng.integers(8))
    elif kind == "hole":
        hurt[at : at + length] = bytes(length)
    elif kind == "cut":
        del hurt[at:]
    elif kind == "growth":
        where = (size, at)[int(rng.integers(2))]
        hurt[where:where] = rng.bytes(length) if rng.integers(2) else bytes(length)
    else:
        to = int(rng.integers(size - length + 1))
        if rng.integers(2):
            # Whole pages, as a file system would mix them up.
            at, to = at // 4096 * 4096, to // 4096 * 4096
            length = min(4096, size - max(at, to))
        piece = hurt[at : at + length]
        if kind == "exchanged":
            hurt[at : at + length] = hurt[to : to + length]
        hurt[to : to + length] = piece
    return bytes(hurt)


def check(make_tree, directory, rounds, seed):
    rng = np.random.default_rng(seed)
    tree = make_tree(directory, seed, npages=12)
    tree.line("a", "b", "c")
    files = {name: (directory / name).read_bytes() for name in tree.names()}
    done = 0
    while done < rounds:
        name, kind = str(rng.choice(["a", "b", "c"])), KINDS[done % len(KINDS)]
        hurt = damage(files[name], kind, rng)
        if hurt == files[name]:
            continue
        (directory / name).write_bytes(hurt)
        with pytest.raises(SnapshotError):
            verify(directory / "c")
        with contextlib.suppress(SnapshotError):
            assert (restore(directory / "c") == tree.memory["c"]).all()
        (directory / name).write_bytes(files[name])
        done += 1
    verify(directory / "c")
    assert sorted(os.listdir(directory)) == ["a", "b", "c"]


def test_verify_finds_damage_of_every_kind(tmp_path, make_tree):
    check(make_tree, tmp_path, 60, 1)


@pytest.mark.stress
def test_verify_finds_1500_damages(tmp_path, make_tree):
    check(make_tree, tmp_path, 1500, 2)
