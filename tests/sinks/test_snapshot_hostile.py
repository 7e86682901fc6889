"""Sidecars that somebody made up: bounded, typed, in range, and never a way out of the directory."""

import base64
import json
import os
import zlib

import numpy as np
import pytest

from dirtylog.sinks.snapshot import info, rebase, restore, save, verify
from dirtylog.sinks.snapshot import sidecar as sidecars
from dirtylog.sinks.snapshot.sidecar import SnapshotError, hasher


@pytest.fixture
def base(tmp_path):
    memory = np.zeros(64 * 4096, np.uint8)
    memory[::8192] = 1
    save(tmp_path / "base", memory)
    return tmp_path / "base"


def forge(path, **changes):
    """Write a sidecar with other values and a digest that matches them."""
    name = f"{path}.json"
    with open(name) as file:
        body = json.load(file)
    del body["digest"]
    body.update(changes)
    for key in [key for key, value in changes.items() if value is ...]:
        del body[key]
    digest = hasher("xxh3_128")(sidecars._canonical(body))
    with open(name, "wb") as file:
        file.write(sidecars._canonical({**body, "digest": digest}))


def bitmap(data):
    return base64.b64encode(zlib.compress(data)).decode()


LINK = {"kind": "diff", "parent_digest": "0" * 32}


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": True},
        {"format": "zip"},
        {"more": 1},
        {"epoch": ...},
        {"page_size": 0},
        {"page_size": 3000},
        {"page_size": 1 << 31},
        {"page_size": 4096.0},
        {"page_size": "4096"},
        {"nbytes": 0},
        {"nbytes": -1},
        {"nbytes": 1 << 62},
        {"nbytes": 64 * 4096 - 1},
        {"nbytes": True},
        {"count": -1},
        {"count": 65},
        {"count": 31},
        {"epoch": -1},
        {"epoch": 1 << 63},
        {"epoch": "1"},
        {"exact": 1},
        {"kind": "half"},
        {"kind": "diff"},
        {"kind": []},
        {"parent": "x"},
        {"parent_digest": "0" * 32},
        {"id": "../../../../../../../etc/passwd "},
        {"id": "0" * 31},
        {"id": None},
        {"holds": "x"},
        {"algorithm": "md5"},
        {"algorithm": ["xxh3_128"]},
        {"bitmap": 3},
        {"bitmap": "not base64!"},
        {"bitmap": "AAAA"},
        {"bitmap": bitmap(bytes(7))},
        {"bitmap": bitmap(bytes(9))},
        {"bitmap": bitmap(bytes(8))},
        {"bitmap": bitmap(b"\x55" * 8)[:-8]},
        {"bitmap": base64.b64encode(zlib.compress(b"\x55" * 8) + b"x").decode()},
        {"bitmap": bitmap(bytes(1 << 24))},
        {"chunks": []},
        {"chunks": ["0" * 32] * 2},
        {"chunks": ["0" * 31]},
        {"chunks": [0]},
        {"chunks": {"0": "0"}},
        {**LINK, "parent": "../base"},
        {**LINK, "parent": "/etc/passwd"},
        {**LINK, "parent": ""},
        {**LINK, "parent": "."},
        {**LINK, "parent": ".."},
        {**LINK, "parent": "a\0b"},
        {**LINK, "parent": "a" * 300},
        {**LINK, "parent": 5},
        {**LINK, "parent": "missing"},
        {**LINK, "parent": "base"},
    ],
    ids=str,
)
def test_a_made_up_value_is_refused(base, changes):
    forge(base, **changes)
    names = sorted(os.listdir(base.parent))
    for use in (restore, verify, lambda path: rebase(path, path)):
        with pytest.raises(SnapshotError):
            use(base)
    assert sorted(os.listdir(base.parent)) == names


@pytest.mark.parametrize("parent", ["../x/above", "/above", "x/above", ".", "..", "", ".above", "above\n", "a" * 300])
def test_a_parent_is_looked_for_in_no_other_directory(base, parent):
    forge(base, **LINK, parent=parent)
    with pytest.raises(SnapshotError, match="must be a plain file name in the same directory"):
        restore(base)


def test_the_forger_can_write_what_is_right(base):
    # The test above would be worth nothing if forge() spoilt every sidecar.
    forge(base, epoch=77)
    assert verify(base).epoch == 77


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'{"digest": 1e999}', b'{"algorithm": []}'],
    ids=lambda text: repr(text[:10]),
)
def test_a_text_that_is_no_sidecar_is_refused(base, text):
    with open(f"{base}.json", "wb") as file:
        file.write(text)
    with pytest.raises(SnapshotError, match="the sidecar cannot be used"):
        info(base)


def test_a_sidecar_that_is_too_large_is_not_read(base):
    os.truncate(f"{base}.json", sidecars.MAX_SIDECAR_BYTES + 1)
    with pytest.raises(SnapshotError, match="at most 67108864 are read"):
        info(base)


def test_a_pipe_in_place_of_a_file_does_not_hang(base):
    os.unlink(base)
    os.mkfifo(base)
    with pytest.raises(SnapshotError, match="the data is no file"):
        restore(base)
    os.unlink(f"{base}.json")
    os.mkfifo(f"{base}.json")
    with pytest.raises(SnapshotError, match="cannot be used"):
        restore(base)


def test_a_chain_without_end_is_refused(tmp_path, monkeypatch):
    # A digest that fits can be forged, so nothing but the count ends such a chain.
    memory = np.zeros(4096, np.uint8)
    save(tmp_path / "a", memory)
    monkeypatch.setattr(sidecars, "decode", lambda raw, name, real=sidecars.decode: (real(raw, name)[0], "0" * 32))
    forge(tmp_path / "a", kind="diff", parent="a", parent_digest="0" * 32)
    with pytest.raises(SnapshotError, match="longer than 1024 files"):
        restore(tmp_path / "a")
