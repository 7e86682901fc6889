"""The footer of a snapshot: what the file holds, and the digests that vouch for every byte of it.

Behind the data, at a page boundary, stand four sections and a trailer of 64 bytes that finds them: the header (JSON
text), the set of pages that the file holds, one digest for each window of their bytes, and the user's state. The
format is described in ``docs/reference/snapshot-format.md``. A file without a footer is not a snapshot, so the trailer,
written last, is the point at which there is one.

Everything is checked before it is believed. The header is bounded before it is parsed and refused unless it is, byte
for byte, what :func:`header_text` writes; page set and digests are read in blocks, so a file may be of any size
and a reader stays small. The digests find accidents. They are not a signature: whoever can write a file can write
matching digests too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dirtylog._bits.pages import DirtyPages
from dirtylog._bits.words import runs as runs_of_words
from dirtylog.errors import BackendUnavailable, DirtyLogError
from dirtylog.sinks._bytes.extents import WINDOW
from dirtylog.sinks.snapshot._footers import check_runs
from dirtylog.sinks.snapshot.layout import Layout

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "ALIGNMENT",
    "DIGEST_BYTES",
    "MAX_PAGES",
    "Footer",
    "Row",
    "SnapshotError",
    "best_digest",
    "decode_state",
    "encode_state",
    "footer_offset",
    "hasher",
    "header_text",
    "held_pages",
    "page_blocks",
    "plain_name",
    "read",
    "read_whole",
    "regions_of",
    "trailer",
    "values",
]

FORMAT = "dirtylog-snapshot"
MAGIC = b"dirtylog"
END = b"SNAPEND\n"
# Magic, version, footer's offset, header's length, whole length of the footer; then a digest of all, and the end mark.
TRAILER = struct.Struct("<8sQQQQ16s8s")
ALIGNMENT = 4096
DIGEST_BYTES = 16
MIN_PAGE_SIZE = 512
MAX_PAGE_SIZE = 1 << 30
# 2**36 pages of 4 KiB are 256 TiB: what a 48-bit address space can map.
MAX_PAGES = 1 << 36
MAX_HEADER_BYTES = 4 << 20
MAX_STATE_BYTES = 16 << 20
MAX_TIME = (1 << 63) - 1
MAX_REGIONS = 10_000
# Of header and state each: an empty list is 3 bytes of JSON and 64 of memory, so the text's length bounds nothing.
MAX_VALUES = 1 << 18
# Each value but the first stands behind one of these.
_OPENS = (b",", b"[", b"{")
MAX_NAME = 200
# A window's digest has 16 bytes, so this is enough for 16 TiB of pages that are held, and bounds the work of a check.
MAX_FOOTER_BYTES = 1 << 30
BLOCK = 1 << 17
# Most footers are shorter than this, and read in one go.
TAIL = 1 << 15
# Words with every second page set become 64 times as many bytes of runs.
WORDS_BLOCK = 1 << 14

# A region: name, type, shape, order, start and length in bytes.
Row = tuple[str, Any, tuple[int, ...], str | tuple[int, ...], int, int]

_HEX32 = re.compile(r"[0-9a-f]{32}")


class SnapshotError(DirtyLogError):
    """A snapshot that cannot be used: missing, damaged, or not what its child was taken over.

    Parameters
    ----------
    message : str
        What is wrong, with the file name.
    damage : tuple of str, optional
        One line for each place that is damaged.
    """

    def __init__(self, message: str, damage: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.damage = damage


def _xxh3(data: Buffer) -> bytes:
    from xxhash import xxh3_128_digest

    return bytes(xxh3_128_digest(data))


def _blake2b(data: Buffer) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


_HASHERS: dict[str, Callable[[Buffer], bytes]] = {"xxh3_128": _xxh3, "blake2b_128": _blake2b}


def hasher(algorithm: str) -> Callable[[Buffer], bytes]:
    """Return the function from bytes to a digest of 16 bytes that `algorithm` names.

    Raises
    ------
    ValueError
        No such algorithm.
    BackendUnavailable
        xxhash is not installed.
    """
    if algorithm not in _HASHERS:
        raise ValueError(f"digest is {algorithm!r}; it must be one of {', '.join(sorted(_HASHERS))}")
    function = _HASHERS[algorithm]
    try:
        function(b"")
    except ImportError as error:
        raise BackendUnavailable(
            "xxhash", f"import xxhash: {error}", "pip install xxhash, or write with digest='blake2b_128'"
        ) from None
    return function


def best_digest() -> str:
    """Name the fastest algorithm that is here: xxhash is an extra, and snapshots are written without it, too."""
    try:
        import xxhash  # noqa: F401
    except ImportError:
        return "blake2b_128"
    return "xxh3_128"


def plain_name(name: object) -> bool:
    """Say whether a name read from a file is a plain file name: no directory, nothing hidden, nothing unprintable."""
    if not isinstance(name, str) or name.startswith(".") or "/" in name or not name.isprintable():
        return False
    return 0 < len(os.fsencode(name)) <= MAX_NAME


@dataclass(frozen=True, slots=True)
class Footer:
    """What the header of a footer says; every field has been checked.

    Parameters
    ----------
    id : str
        32 random hexadecimal digits.
    kind : str
        ``"full"``: pages not held are zero. ``"diff"``: they are the parent's.
    page_size, nbytes : int
        Page size and size of the page space, in bytes. The last page may be partial.
    count, rows, exact : int, int, bool
        How many pages the file holds, in how many runs, and whether the source that reported them was sure. This set
        is what counts, not the file's holes: a file system may report data in coarser blocks than a page, and a copy
        of the file may have turned zeros into holes.
    parent, parent_digest : str or None
        Name of the parent and its digest.
    holds : str or None
        After a rebase, flatten or merge: the :attr:`identity` of the snapshot whose memory this file now holds.
    time : int
        When its memory was as it is, in nanoseconds since 1970; a merge keeps that of the newest. If the clock was put
        back, just after the newest snapshot that lay in the directory.
    epoch : int or None
        The observer's epoch number.
    algorithm : str
        Name of the windows' digest.
    named : bool
        Whether the memory was given by names.
    regions : tuple
        For each array its name, type, shape, order, and where it begins and how long it is in bytes.
    state : int
        Bytes of the user's state; 0 where there is none.
    """

    id: str
    kind: str
    page_size: int
    nbytes: int
    count: int
    rows: int
    exact: bool
    parent: str | None
    parent_digest: str | None
    holds: str | None
    time: int
    epoch: int | None
    algorithm: str
    named: bool
    regions: tuple[Row, ...]
    state: int

    @property
    def npages(self) -> int:
        """Size of the page space in pages."""
        return -(-self.nbytes // self.page_size)

    @property
    def as_words(self) -> bool:
        """Whether the page set is kept as words of a bitmap, which are then shorter than the runs."""
        return 16 * self.rows > 8 * -(-self.npages // 64)

    @property
    def set_bytes(self) -> int:
        """Length of the page set."""
        return 8 * -(-self.npages // 64) if self.as_words else 16 * self.rows


def footer_offset(nbytes: int) -> int:
    """Return where the footer of a file with so many bytes of data begins."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def values(text: bytes) -> int:
    """Return how many values JSON text has at most, in little memory and without parsing it."""
    # What is left of quotes begins or ends a string.
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    count = sum(map(bare.count, _OPENS))
    if count <= MAX_VALUES:
        return count
    count, inside = 0, False
    for at in range(0, len(bare), BLOCK):
        part = np.frombuffer(bare, np.uint8, min(BLOCK, len(bare) - at), at)
        quoted = np.logical_xor.accumulate(part == ord('"')) ^ inside
        count += int(np.isin(part[~quoted], np.frombuffer(b"".join(_OPENS), np.uint8)).sum())
        inside = bool(quoted[-1])
    return count


# json.dumps would make one for each text.
_compact = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode


def header_text(footer: Footer) -> bytes:
    """Return the header: JSON text, filled up with spaces to a multiple of 16 bytes so that what follows is aligned."""
    body = {"format": FORMAT, **{name: getattr(footer, name) for name in Footer.__dataclass_fields__}}
    text = _compact(body).encode("ascii")
    return text + b" " * (-(len(text) + 1) % 16) + b"\n"


def held_pages(pages: DirtyPages) -> tuple[int, bytes]:
    """Return how many runs a page set has, and the section that holds it: runs, or words where they are shorter."""
    runs = pages.runs()
    if 16 * len(runs) > 8 * -(-pages.npages // 64):
        return len(runs), pages.to_bytes()
    return len(runs), runs.astype("<i8", copy=False).tobytes()


def trailer(offset: int, header: int, sections: list[bytes], layout: Layout = Layout.PLAIN) -> tuple[bytes, str]:
    """Return the trailer for a footer that begins at `offset`, and the digest that is the snapshot's own."""
    head = (MAGIC, int(layout), offset, header, sum(map(len, sections)))
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    digest.update(struct.pack("<8sQQQQ", *head))
    for section in sections:
        digest.update(section)
    return TRAILER.pack(*head, digest.digest(), END), digest.hexdigest()


# ---- the user's state: JSON, with bytes in it -----------------------------------------------------------------------


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key == "$bytes":
                raise TypeError(f"state has the key {key!r:.80}; a key must be a str, and not '$bytes'")
        return {key: _to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(each) for each in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(
        f"state has a {type(value).__name__}; it may have dicts, lists, text, numbers and bytes "
        "(pass array.tolist(), or the array as a region of its own)"
    )


def _from_json(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["$bytes"], validate=True) if set(value) == {"$bytes"} else value


def encode_state(state: object) -> bytes:
    """Return the state as the text that :func:`decode_state` reads; None is not text.

    Raises
    ------
    TypeError, ValueError
        It has something other than JSON and bytes, or is too large.
    """
    if state is None:
        return b""
    try:
        text = json.dumps(_to_json(state), ensure_ascii=True).encode("ascii")
    except RecursionError:
        raise ValueError("state is nested too deep to be written") from None
    if len(text) > MAX_STATE_BYTES:
        raise ValueError(f"state has {len(text)} bytes as JSON; at most {MAX_STATE_BYTES} are kept")
    if values(text) > MAX_VALUES:
        raise ValueError(
            f"state has {values(text)} values, and at most {MAX_VALUES} are kept: pass many numbers as bytes, or as an "
            "array of its own beside the memory"
        )
    return text


def decode_state(text: bytes, name: str) -> Any:
    """Return what :func:`encode_state` was given."""
    if not text:
        return None
    try:
        _check(values(text) <= MAX_VALUES, f"it has more than {MAX_VALUES} values")
        return json.loads(text.decode("ascii"), object_hook=_from_json)
    except (ValueError, TypeError, RecursionError) as error:
        raise SnapshotError(f"{name}: the state cannot be used: {error}") from None


# ---- reading --------------------------------------------------------------------------------------------------------


def _check(condition: object, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _integer(value: object, low: int, high: int, what: str) -> int:
    # bool is an int to isinstance, and a JSON true is not a number.
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is {value!r:.40}; it must be a number from {low} to {high}")
    return value


def regions_of(rows: object, nbytes: int, page_size: int, named: object) -> tuple[Any, ...]:
    """Return the rows of regions that JSON made; ValueError where they cannot be those of so many bytes."""
    _check(isinstance(named, bool), "named is not true or false")
    if not isinstance(rows, list) or not 0 < len(rows) <= MAX_REGIONS:
        raise ValueError(f"regions is not a list of 1 to {MAX_REGIONS} arrays")
    _check(named or len(rows) == 1, "memory without a name is one region")
    found, names, at = [], set(), 0
    for row in rows:
        _check(isinstance(row, list) and len(row) == 6, "a region has other fields than a region has")
        name, kind, shape, order, start, length = row
        _check(isinstance(name, str) and name not in names and len(name) <= MAX_NAME, "a region's name is not a name")
        names.add(name)
        _check(isinstance(kind, str | list), "a region's type is not a type")
        _check(isinstance(shape, list) and len(shape) <= 64, "a region's shape is not a shape")
        axes = (
            isinstance(order, list)
            and all(type(axis) is int for axis in order)
            and sorted(order) == [*range(len(shape))]
        )
        _check(axes or (isinstance(order, str) and order in ("C", "F")), "a region's order is not an order")
        for length_of_axis in shape:
            _integer(length_of_axis, 0, nbytes, "an axis")
        _integer(start, 0, nbytes, "a region's start")
        _integer(length, 1, nbytes, "a region's length")
        _check(start == -(-at // page_size) * page_size, "a region does not begin where the one before it ended")
        at = start + length
        found.append((name, kind, tuple(shape), tuple(order) if axes else order, start, length))
    _check(at == nbytes, "the regions are not the memory")
    return tuple(found)


def _validated(body: dict[str, Any]) -> Footer:
    _check(body.pop("format", None) == FORMAT, "it is not a snapshot's header")
    _check(set(body) == set(Footer.__dataclass_fields__), "it has other fields than a header has")
    page_size = _integer(body["page_size"], MIN_PAGE_SIZE, MAX_PAGE_SIZE, "page_size")
    _check(page_size & (page_size - 1) == 0, f"page_size is {page_size}; it must be a power of two")
    nbytes = _integer(body["nbytes"], 1, min(MAX_PAGES * page_size, 1 << 62), "nbytes")
    npages = -(-nbytes // page_size)
    count = _integer(body["count"], 0, npages, "count")
    # No two runs touch, so a set has at most as many runs as pages, and as clean pages and one more.
    _integer(body["rows"], 1 if count else 0, min(count, npages - count + 1), "rows")
    _integer(body["state"], 0, MAX_STATE_BYTES, "state")
    _integer(body["time"], 0, MAX_TIME, "time")
    if body["epoch"] is not None:
        _integer(body["epoch"], 0, (1 << 63) - 1, "epoch")
    _check(isinstance(body["exact"], bool), "exact is not true or false")
    _check(body["kind"] in ("full", "diff"), f"kind is {body['kind']!r:.40}; it must be full or diff")
    _check(isinstance(body["algorithm"], str) and body["algorithm"] in _HASHERS, "the digest algorithm is unknown")
    for key in ("id", "parent_digest", "holds"):
        value = body[key]
        optional = key != "id" and value is None
        _check(optional or (isinstance(value, str) and _HEX32.fullmatch(value)), f"{key} is not 32 hexadecimal digits")
    _check(
        body["parent"] is None or plain_name(body["parent"]),
        f"parent is {body['parent']!r:.80}; it must be a plain file name",
    )
    _check(
        (body["kind"] == "diff") == (body["parent"] is not None) == (body["parent_digest"] is not None),
        "a diff has a parent with a digest, and only a diff",
    )
    return Footer(**{**body, "regions": regions_of(body["regions"], nbytes, page_size, body["named"])})


def read_whole(descriptor: int, offset: int, length: int, name: str) -> bytes:
    """Read so many bytes of a file. One call may bring fewer: that is neither its end nor damage."""
    parts, left = [], length
    while left:
        part = os.pread(descriptor, left, offset)
        if not part:
            raise SnapshotError(f"{name}: the file ends {left} bytes too early; it was cut")
        parts.append(part)
        offset, left = offset + len(part), left - len(part)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the sections of a footer lie in the file, in bytes, and the digest of it all.

    Parameters
    ----------
    data, offset : int
        Where the data ends, and where the footer begins.
    pages, digests, state : int
        Offsets of the sections.
    held : int
        Bytes of the pages that the file holds.
    digest : str
        The snapshot's own digest, in 32 hexadecimal digits.
    layout : Layout
        Where the pages lie.
    """

    data: int
    offset: int
    pages: int
    digests: int
    state: int
    held: int
    digest: str
    layout: Layout


def read(descriptor: int, name: str) -> tuple[Footer, Place]:
    """Read and check the footer of an open file; its page set is checked too, and no more of it kept than a block.

    Raises
    ------
    SnapshotError
        The file has no footer, or the footer is damaged or out of bounds.
    OSError
        It cannot be read.

    Notes
    -----
    O(footer); allocates 4 MiB for the header and a few blocks.
    """
    size = os.fstat(descriptor).st_size
    # A diff that holds nothing has no data.
    if size < TRAILER.size + 16:
        raise SnapshotError(f"{name}: the footer cannot be used: {size} bytes are not a snapshot, or one was cut short")
    start = max(size - TAIL, 0)
    tail = read_whole(descriptor, start, size - start, name)
    raw = tail[-TRAILER.size :]
    magic, version, offset, header, length, expected, end = TRAILER.unpack(raw)
    try:
        _check(magic == MAGIC and end == END, "the file does not end as a snapshot does: it is none, was cut or grew")
        _check(version in (*Layout,), f"it is of version {version}; this library reads versions 2 and 3")
        layout = Layout(version)
        _integer(length, 16, MAX_FOOTER_BYTES, "the footer's length")
        _integer(header, 16, min(MAX_HEADER_BYTES, length), "the header's length")
        _check(offset % ALIGNMENT == 0 and offset + length + TRAILER.size == size, "the footer does not fill the file")
        if offset >= start:
            # All of it is there; no offset is asked for but those of the footer.
            descriptor, tail = -1, tail[offset - start :]

        def part(at: int, length: int) -> bytes:
            if descriptor < 0:
                return tail[at - offset : at - offset + length]
            return read_whole(descriptor, at, length, name)

        digest = hashlib.blake2b(raw[:40], digest_size=DIGEST_BYTES)
        for at in range(offset, offset + length, BLOCK):
            digest.update(part(at, min(BLOCK, offset + length - at)))
        _check(digest.digest() == expected, "its digest does not match")
        text = part(offset, header)
        _check(values(text) <= MAX_VALUES, f"its header has more than {MAX_VALUES} values")
        body = json.loads(text.decode("ascii"))
        _check(isinstance(body, dict), "it is not a JSON object")
        footer = _validated(body)
        _check(header_text(footer) == text, "it is not in the form it was written in")
        _check(layout is Layout.PLAIN or footer.kind == "diff", "only the pages of a diff are packed")
        windows = (length - header - footer.set_bytes - footer.state) // DIGEST_BYTES
        pages = offset + header
        state = offset + length - footer.state
        _check(
            windows >= 0 and state == pages + footer.set_bytes + windows * DIGEST_BYTES, "the sections do not add up"
        )
        held = _check_pages(footer, pages, part)
        _check(windows == -(-held // WINDOW), "the digests do not cover the pages")
        data = layout.data_bytes(footer.nbytes, held)
        _check(footer_offset(data) == offset, f"the data is not the {data} bytes it should be")
    except SnapshotError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise SnapshotError(f"{name}: the footer cannot be used: {error}") from None
    return footer, Place(data, offset, pages, pages + footer.set_bytes, state, held, expected.hex(), layout)


def _check_pages(footer: Footer, offset: int, part: Callable[[int, int], bytes]) -> int:
    """Check that the runs ascend, do not touch and are as many as announced; return the bytes they hold."""
    past, count, rows = -1, 0, 0
    if footer.as_words:
        tail = footer.npages % 64
        last = struct.unpack("<Q", part(offset + footer.set_bytes - 8, 8))[0]
        _check(not tail or last >> tail == 0, "the page set has pages past the end")  # I7
    for at, block in _set_blocks(footer, offset, part):
        if not footer.as_words and sys.byteorder == "little" and (found := check_runs(block, footer.npages, past)):
            count, past, rows = count + found[0], found[1], rows + len(block) // 16
            continue
        runs = _runs(footer, at, block)
        if not len(runs):
            continue
        first, length = runs[:, 0], runs[:, 1]
        # A run may go on in the next block where the set is words, and only there.
        joined = int(footer.as_words and first[0] == past)
        _check(joined or first[0] > past, "the runs of pages do not ascend")
        _check(
            (length > 0).all() and (first >= 0).all() and (first <= footer.npages).all(),
            "a run of pages is out of range",
        )
        _check((length <= footer.npages - first).all(), "a run of pages reaches past the end")
        _check((first[1:] > (first + length)[:-1]).all(), "the runs of pages do not ascend")
        past = int(first[-1] + length[-1])
        count += int(length.sum())
        rows += len(runs) - joined
    _check((count, rows) == (footer.count, footer.rows), f"the page set has {count} pages in {rows} runs; "
           f"{footer.count} in {footer.rows} are announced")  # fmt: skip
    return count * footer.page_size - (footer.npages * footer.page_size - footer.nbytes if past == footer.npages else 0)


def _set_blocks(footer: Footer, offset: int, part: Callable[[int, int], bytes]) -> Iterator[tuple[int, bytes]]:
    """Read a page set in blocks: where each begins in it, and its bytes."""
    size = WORDS_BLOCK if footer.as_words else BLOCK
    for at in range(0, footer.set_bytes, size):
        yield at, part(offset + at, min(size, footer.set_bytes - at))


def _runs(footer: Footer, at: int, block: bytes) -> npt.NDArray[np.int64]:
    if not footer.as_words:
        return np.frombuffer(block, "<i8").reshape(-1, 2).astype(np.int64, copy=False)
    runs = runs_of_words(np.frombuffer(block, "<u8"))
    runs[:, 0] += at * 8
    return runs


def page_blocks(descriptor: int, footer: Footer, offset: int, name: str) -> Iterator[npt.NDArray[np.int64]]:
    """Read the set of held pages from `offset` in blocks of runs, ascending, none of them empty."""
    for at, block in _set_blocks(footer, offset, lambda at, length: read_whole(descriptor, at, length, name)):
        runs = _runs(footer, at, block)
        if len(runs):
            yield runs
