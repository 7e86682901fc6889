"""Footers that somebody made up: bounded, typed, in range, and never a way out of the directory."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from dirtylog.sinks.snapshot import footer as footers
from dirtylog.sinks.snapshot import info, rebase, restore, save, verify
from dirtylog.sinks.snapshot._footers import check_runs
from dirtylog.sinks.snapshot.footer import SnapshotError
from dirtylog.sinks.snapshot.space import dtype_of

DATA = 64 * 4096


@pytest.fixture
def base(tmp_path):
    memory = np.zeros(DATA, np.uint8)
    memory[::8192] = 1
    save(tmp_path / "base", memory)
    return tmp_path / "base"


def parts(path):
    """Take the footer of a snapshot apart: header, page set, digests and state."""
    raw = path.read_bytes()
    _, _, offset, header, _, _, _ = footers.TRAILER.unpack(raw[-64:])
    body = json.loads(raw[offset : offset + header])
    rest = raw[offset + header : -64]
    return offset, body, rest[:8], rest[8:-16], rest[-16:]


def forge(path, *, pages=None, digests=None, offset=None, text=None, version=2, **changes):
    """Write a footer with other values and a digest that matches them."""
    at, body, ours, nothing, theirs = parts(path)
    assert nothing == b""
    body.update(changes)
    for key in [key for key, value in changes.items() if value is ...]:
        del body[key]
    if text is None:
        text = json.dumps(body, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 1) % 16) + b"\n"
    sections = text + (ours if pages is None else pages) + (theirs if digests is None else digests)
    head = footers.TRAILER.pack(
        b"dirtylog", version, at if offset is None else offset, len(text), len(sections), b"", b""
    )
    digest = hashlib.blake2b(head[:40] + sections, digest_size=16).digest()
    with open(path, "r+b") as file:
        file.truncate(at)
        file.seek(at)
        file.write(sections + head[:40] + digest + footers.END)


def words(*values):
    return np.array(values, "<u8").tobytes()


LINK = {"kind": "diff", "parent_digest": "0" * 32}
REGION = ["", "|u1", [DATA], "C", 0, DATA]


@pytest.mark.parametrize(
    "changes",
    [
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
        {"time": -1},
        {"time": 1.5},
        {"time": 1 << 63},
        {"rows": 31},
        {"rows": 33},
        {"rows": 1 << 40},
        {"rows": -1},
        {"state": 1},
        {"state": -16},
        {"named": 1},
        {"named": None},
        {"regions": []},
        {"regions": [REGION, REGION]},
        {"regions": [[*REGION[:4], 1, DATA]]},
        {"regions": [[*REGION[:5], DATA - 1]]},
        {"regions": [["", "|u1", ["x"], "C", 0, DATA]]},
        {"regions": [["", 5, [DATA], "C", 0, DATA]]},
        {"regions": [["", "|u1", [DATA], "X", 0, DATA]]},
        {"regions": [REGION[:5]]},
        {"regions": {"": REGION}},
        {"page_size": 256, "count": 32},
        {"pages": words(0)},
        {"pages": words(0x5555555555555554)},
        {"pages": words(0x5555555555555557)},
        {"pages": words(0x5555555555555555, 0)},
        {"pages": b""},
        {"digests": b""},
        {"digests": bytes(32)},
        {"digests": bytes(17)},
        {"offset": 0},
        {"offset": DATA - 1},
        {"offset": 1 << 60},
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
    with pytest.raises(SnapshotError, match="must be a plain file name"):
        restore(base)


def test_the_forger_can_write_what_is_right(base):
    # The test above would be worth nothing if forge() spoilt every footer.
    forge(base, epoch=77)
    assert verify(base).epoch == 77


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'{"digest": 1e999}', b'{"algorithm": []}'],
    ids=lambda text: repr(text[:10]),
)
def test_a_text_that_is_no_header_is_refused(base, text):
    forge(base, text=text)
    with pytest.raises(SnapshotError, match="the footer cannot be used"):
        info(base)
    base.write_bytes(text)
    with pytest.raises(SnapshotError, match="the footer cannot be used"):
        info(base)


def test_a_footer_of_another_version_is_refused_by_its_number(base):
    for version in (1, 4):
        forge(base, version=version)
        with pytest.raises(SnapshotError, match=f"of version {version}; this library reads versions 2 and 3"):
            info(base)


def test_a_footer_that_is_too_large_is_not_read(base):
    raw = base.read_bytes()
    fields = footers.TRAILER.unpack(raw[-64:])
    with open(base, "r+b") as file:
        file.truncate(DATA + (2 << 30))
        file.seek(DATA + (2 << 30))
        file.write(footers.TRAILER.pack(*fields[:4], 2 << 30, *fields[5:]))
    with pytest.raises(SnapshotError, match="it must be a number from 16 to"):
        info(base)


def test_a_pipe_in_place_of_a_file_does_not_hang(base):
    os.unlink(base)
    os.mkfifo(base)
    with pytest.raises(SnapshotError, match="not a regular file"):
        restore(base)


def test_runs_that_do_not_ascend_or_leave_the_memory_are_refused(tmp_path):
    npages = 1 << 13
    memory = np.zeros(npages * 512, np.uint8)
    memory[[0, 512 * 4000]] = 1
    save(tmp_path / "base", memory, page_size=512, sync=False)
    raw = (tmp_path / "base").read_bytes()
    *fields, _, _ = footers.TRAILER.unpack(raw[-64:])
    offset, header = fields[2:4]
    at = offset + header
    assert np.frombuffer(raw[at : at + 32], "<i8").tolist() == [0, 1, 4000, 1]
    assert raw[offset:at].count(b'"count":2') == 1
    far = 2**63 - 1
    for runs in (
        [4000, 1, 0, 1], [0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 4000, 2], [-1, 1, 4000, 1], [0, 1, npages, 1],
        [0, 1, npages - 1, 2], [0, 3, 4000, -1], [0, 1, 4000, far], [far, 1, far, 1],
    ):  # fmt: skip
        block = np.array(runs, "<i8").tobytes()
        assert check_runs(block, npages, -1) is None
        # Announced are two pages, or as many as there are before the bad run.
        for count in (b"2", b"1"):
            forged = raw[offset:at].replace(b'"count":2', b'"count":' + count) + block + raw[at + 32 : -64]
            head = raw[-64:-24]
            digest = hashlib.blake2b(head + forged, digest_size=16).digest()
            (tmp_path / "base").write_bytes(raw[:offset] + forged + head + digest + footers.END)
            with pytest.raises(SnapshotError, match="run"):
                restore(tmp_path / "base")


BOMB = """
import json, os, resource, struct, hashlib, sys
import numpy as np
from dirtylog.sinks.snapshot import footer as footers, info, save, verify
path = sys.argv[1]
npages, size = 1 << 24, 512
footer = footers.Footer(
    id="0" * 32, kind="full", page_size=size, nbytes=npages * size, count=npages // 2, rows=npages // 2, exact=True,
    parent=None, parent_digest=None, holds=None, time=0, epoch=None, algorithm="blake2b_128", named=False,
    regions=(("", "|u1", (npages * size,), "C", 0, npages * size),), state=0,
)
assert footer.as_words
header = footers.header_text(footer)
digest = footers.hasher("blake2b_128")(bytes(1 << 20))
sections = [header, b"\x55" * (npages // 8), digest * (npages // 2 * size >> 20)]
trailer, _ = footers.trailer(npages * size, len(header), sections)
with open(path, "wb") as file:
    file.seek(npages * size)
    file.write(b"".join([*sections, trailer]))
info(path)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), used + (32 << 20)))
from dirtylog.sinks.snapshot.chain import Layer
with Layer(path) as layer:
    total = sum(size for size, extents in layer.windows())
assert total == npages // 2 * size, total
"""


@pytest.mark.usefixtures("bounded")
def test_every_second_page_of_a_large_memory_is_read_in_little_memory(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", BOMB, str(tmp_path / "bomb")], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr


def test_a_chain_without_end_is_refused(tmp_path, monkeypatch):
    # No file can hold its own digest, so this takes a reader that believes it does.
    save(tmp_path / "a", np.zeros(DATA, np.uint8) + np.repeat([1, 0], 4096)[np.arange(DATA) % 8192].astype(np.uint8))
    forge(tmp_path / "a", kind="diff", parent="a", parent_digest="0" * 32)
    real = footers.read

    def believing(descriptor, name):
        footer, place = real(descriptor, name)
        return footer, dataclasses.replace(place, digest="0" * 32)

    monkeypatch.setattr(footers, "read", believing)
    with pytest.raises(SnapshotError, match="its chain comes back to"):
        restore(tmp_path / "a")


# ---- much to parse in little text ------------------------------------------------------------------------------------

GREEDY = """
import resource, sys
from dirtylog.sinks.snapshot import footer as footers, info, restore
from dirtylog.sinks.snapshot.footer import SnapshotError
more, good, *bad = sys.argv[1:]
info(good)
restore(good)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(more),) * 2)
for path in bad:
    try:
        info(path)
    except SnapshotError as error:
        assert "more than" in str(error), error
    else:
        raise AssertionError(path)
"""


def sealed(path, header, state):
    """Write a snapshot of one zero page with this header, or the one that goes with this state."""
    footer = footers.Footer(
        id="0" * 32, kind="full", page_size=4096, nbytes=4096, count=0, rows=0, exact=True, parent=None,
        parent_digest=None, holds=None, time=0, epoch=None, algorithm="blake2b_128", named=False,
        regions=(("", "|u1", (4096,), "C", 0, 4096),), state=len(state),
    )  # fmt: skip
    sections = [header or footers.header_text(footer), state]
    trailer, _ = footers.trailer(4096, len(sections[0]), sections)
    with open(path, "wb") as file:
        file.seek(4096)
        file.write(b"".join([*sections, trailer]))
    return str(path)


def test_text_of_very_many_values_is_refused_in_little_memory(tmp_path, sanitized):
    many = (footers.MAX_VALUES + 9) * 4
    bad = [
        sealed(tmp_path / "header", b'{"regions":[' + b"[]," * many + b"0]}", b""),
        sealed(tmp_path / "objects", None, b"[" + b"{}," * many + b"0]"),
        sealed(tmp_path / "words", None, b"[" + b'"a",' * many + b"0]"),
        sealed(tmp_path / "depth", None, b"[" * 90 + b"[]," * many + b"0" + b"]" * 90),
    ]
    good = sealed(tmp_path / "good", None, b'{"text":"' + b"[]," * footers.MAX_VALUES + b'"}')
    # A sanitizer keeps what was freed.
    more = (1 << 30) if sanitized else (32 << 20)
    process = subprocess.run(
        [sys.executable, "-c", GREEDY, str(more), good, *bad], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr


def test_what_is_refused_when_read_is_refused_when_written(tmp_path):
    with pytest.raises(ValueError, match="at most 262144 are kept: pass many numbers as bytes, or as an array"):
        save(tmp_path / "new", bytes(4096), state=[0] * (footers.MAX_VALUES + 1))
    save(tmp_path / "new", bytes(4096), state={"quotes": '\\"[,' * footers.MAX_VALUES})
    assert info(tmp_path / "new").state == {"quotes": '\\"[,' * footers.MAX_VALUES}


@pytest.mark.parametrize(
    "kind",
    [
        *("4i2", "i4,f8", "(2,3)f8", "2" * 100, "", [["x", "4i2"]], [["x", ["4i2", [2]]]], [["x", [["y", "i4,i4"]]]]),
        *([["x", [[["y", "4i2"]], 2]]], [["x", [["4i2", 2], 3]]], [["x", {"names": ["y"], "formats": ["4i2"]}]], None),
    ],
)
def test_a_type_that_numpy_would_read_as_python_is_refused(kind):
    with pytest.raises(SnapshotError, match="is not one plain type"):
        dtype_of(kind, "snapshot")


@pytest.mark.parametrize("kind", [[["x", "<i8", "4i2"]], [["x", "<i8", ["4i2"]]], [["x", ["<i8", "4i2"]]]])
def test_a_shape_that_numpy_would_read_as_a_type_is_refused(kind):
    with pytest.raises(SnapshotError, match="is not a shape"):
        dtype_of(kind, "snapshot")


@pytest.mark.parametrize("kind", [[["x"]], [["x", "<i8", [2], 3]], [["x", "<i8", [-1]]], [[["a", "b", "c"], "<i8"]]])
def test_what_is_no_field_is_refused(kind):
    with pytest.raises(SnapshotError, match="a region's type cannot be used"):
        dtype_of(kind, "snapshot")
