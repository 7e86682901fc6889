"""The sidecar of a snapshot: the JSON text that says what the data file holds, and vouches for every byte of it.

``NAME.json`` stands beside the plain data file ``NAME`` and is the point at which a snapshot comes to be: without it
there is none. Everything in it is checked before anything is believed; a text that is not, byte for byte, what
:func:`encode` would have written is refused, so that no flipped bit passes. The digests find accidents. They are no
signature: whoever can write the files can write matching digests too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dirtylog._bits.pages import DirtyPages
from dirtylog.errors import BackendUnavailable, DirtyLogError
from dirtylog.sinks.extents import WINDOW

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "MAX_PAGES",
    "MAX_SIDECAR_BYTES",
    "Sidecar",
    "SnapshotError",
    "decode",
    "encode",
    "hasher",
    "plain_name",
    "read",
]

FORMAT = "dirtylog-snapshot"
VERSION = 1
SUFFIX = ".json"
# What a sidecar may make a reader allocate: its own text, and a bitmap of so many pages (32 MiB).
MAX_SIDECAR_BYTES = 64 << 20
MAX_PAGES = 1 << 28
MAX_NAME = 200

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


def _xxh3(data: Buffer) -> str:
    from xxhash import xxh3_128_hexdigest

    return str(xxh3_128_hexdigest(data))


def _blake2b(data: Buffer) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


_HASHERS: dict[str, Callable[[Buffer], str]] = {"xxh3_128": _xxh3, "blake2b_128": _blake2b}


def hasher(algorithm: str) -> Callable[[Buffer], str]:
    """Return the function from bytes to 32 hexadecimal digits that `algorithm` names.

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


def plain_name(name: object) -> bool:
    """Say whether a name read from a file is a plain file name: no directory, nothing hidden, nothing unprintable."""
    return (
        isinstance(name, str)
        and 0 < len(os.fsencode(name)) <= MAX_NAME
        and not name.startswith(".")
        and "/" not in name
        and name.isprintable()
    )


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What a sidecar says; every field has been checked.

    Parameters
    ----------
    id : str
        32 random hexadecimal digits; the data file is staged under a name made from it.
    kind : str
        ``"full"``: pages not held are zero. ``"diff"``: they are the parent's.
    page_size, nbytes : int
        Page size and size of the memory, in bytes. The last page may be partial.
    count, exact, bitmap : int, bool, str
        The pages that the data file holds. This set is what counts, not the file's holes: a file system may report
        data in coarser blocks than a page, and a copy of the file may have turned zeros into holes.
    parent, parent_digest : str or None
        Name of the parent in the same directory, and the digest of its sidecar.
    holds : str or None
        After a rebase: digest of the sidecar of the diff whose memory this file now holds.
    epoch : int or None
        The observer's epoch number.
    algorithm : str
        Name of the digest.
    chunks : tuple of str
        One digest for each window (1 MiB) of the held pages' bytes, laid end to end.
    """

    id: str
    kind: str
    page_size: int
    nbytes: int
    count: int
    exact: bool
    bitmap: str
    parent: str | None
    parent_digest: str | None
    holds: str | None
    epoch: int | None
    algorithm: str
    chunks: tuple[str, ...]

    @property
    def npages(self) -> int:
        """Size of the memory in pages."""
        return -(-self.nbytes // self.page_size)

    def pages(self) -> DirtyPages:
        """Unpack the set of held pages.

        Raises
        ------
        SnapshotError
            The bitmap is damaged or too large.
        """
        size = -(-self.npages // 64) * 8
        try:
            unpacker = zlib.decompressobj()
            # Bounded: a stream that would grow past the bitmap's size is cut there and refused below.
            data = unpacker.decompress(base64.b64decode(self.bitmap, validate=True), size + 1)
            if len(data) != size or not unpacker.eof or unpacker.unused_data:
                raise ValueError(f"the bitmap does not unpack to the {size} bytes of {self.npages} pages")
            pages = DirtyPages.from_bytes(data, self.npages, self.page_size)
            if pages.count != self.count:
                raise ValueError(f"the bitmap has {pages.count} pages; {self.count} are announced")
        except (ValueError, zlib.error) as error:
            raise SnapshotError(f"the sidecar's page set is damaged: {error}") from None
        return pages if self.exact else DirtyPages.from_words(pages.words, self.npages, self.page_size, exact=False)


def pack_pages(pages: DirtyPages) -> str:
    """Pack a page set as the text that :meth:`Sidecar.pages` unpacks."""
    return base64.b64encode(zlib.compress(pages.to_bytes(), 1)).decode("ascii")


def encode(sidecar: Sidecar) -> tuple[bytes, str]:
    """Return the text of a sidecar and its digest."""
    body = {"format": FORMAT, "version": VERSION, **asdict(sidecar), "chunks": list(sidecar.chunks)}
    digest = hasher(sidecar.algorithm)(_canonical(body))
    return _canonical({**body, "digest": digest}), digest


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, indent=1, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def _check(condition: object, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _integer(value: object, low: int, high: int, what: str) -> int:
    # bool is an int to isinstance, and a JSON true is no number.
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is {value!r:.40}; it must be a number from {low} to {high}")
    return value


def _validated(body: dict[str, Any]) -> Sidecar:
    _check(body.pop("format", None) == FORMAT, "it is no snapshot's sidecar")
    version = body.pop("version", None)
    _check(
        type(version) is int and version == VERSION,
        f"it is of version {version!r:.20}; this library reads version {VERSION}",
    )
    _check(set(body) == set(Sidecar.__dataclass_fields__), "it has other fields than a sidecar has")
    page_size = _integer(body["page_size"], 1, 1 << 30, "page_size")
    _check(page_size & (page_size - 1) == 0, f"page_size is {page_size}; it must be a power of two")
    nbytes = _integer(body["nbytes"], 1, MAX_PAGES * page_size, "nbytes")
    count = _integer(body["count"], 0, -(-nbytes // page_size), "count")
    if body["epoch"] is not None:
        _integer(body["epoch"], 0, (1 << 63) - 1, "epoch")
    _check(isinstance(body["exact"], bool), "exact is not true or false")
    _check(isinstance(body["bitmap"], str), "bitmap is not a text")
    _check(body["kind"] in ("full", "diff"), f"kind is {body['kind']!r:.40}; it must be full or diff")
    _check(isinstance(body["algorithm"], str) and body["algorithm"] in _HASHERS, "the digest algorithm is unknown")
    for key in ("id", "parent_digest", "holds"):
        value = body[key]
        optional = key != "id" and value is None
        _check(optional or (isinstance(value, str) and _HEX32.fullmatch(value)), f"{key} is not 32 hexadecimal digits")
    _check(
        body["parent"] is None or plain_name(body["parent"]),
        f"parent is {body['parent']!r:.80}; it must be a plain file name in the same directory",
    )
    _check(
        (body["kind"] == "diff") == (body["parent"] is not None) == (body["parent_digest"] is not None),
        "a diff has a parent with a digest, and only a diff",
    )
    chunks = body["chunks"]
    _check(isinstance(chunks, list), "chunks is not a list")
    _check(all(isinstance(c, str) and _HEX32.fullmatch(c) for c in chunks), "a chunk is not 32 hexadecimal digits")
    # The last page may be cut, so the number of windows is known to within one; it is exact once pages are unpacked.
    most = -(-count * page_size // WINDOW)
    least = -(-max(count * page_size - page_size + 1, 0) // WINDOW) if count else 0
    _check(least <= len(chunks) <= most, f"there are {len(chunks)} chunks; {count} pages have {least} to {most}")
    return Sidecar(**{**body, "chunks": tuple(chunks)})


def decode(raw: bytes, name: str) -> tuple[Sidecar, str]:
    """Check the text of a sidecar; return what it says and its digest.

    Parameters
    ----------
    raw : bytes
        The whole file.
    name : str
        File name for the error.

    Raises
    ------
    SnapshotError
        It is not exactly what :func:`encode` writes, or a value is out of bounds.
    """
    try:
        body = json.loads(raw.decode("ascii"))
        _check(isinstance(body, dict), "it is no JSON object")
        digest = body.pop("digest", None)
        algorithm = body.get("algorithm")
        _check(isinstance(algorithm, str) and algorithm in _HASHERS, "the digest algorithm is unknown")
        _check(hasher(algorithm)(_canonical(body)) == digest, "its digest does not match")
        _check(_canonical({**body, "digest": digest}) == raw, "it is not in the form it was written in")
        return _validated(body), str(digest)
    except (ValueError, TypeError, RecursionError) as error:
        raise SnapshotError(f"{name}: the sidecar cannot be used: {error}") from None


def read(path: str) -> tuple[Sidecar, str]:
    """Read and check the sidecar of the snapshot at `path`.

    Raises
    ------
    SnapshotError
        There is none, it is larger than `MAX_SIDECAR_BYTES`, or :func:`decode` refuses it.
    OSError
        It cannot be read.
    """
    name = path + SUFFIX
    try:
        # Not blocking, and a regular file only: a name in a directory somebody else fills may be a pipe.
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise SnapshotError(f"{path}: there is no such snapshot (no {os.path.basename(name)})") from None
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > MAX_SIDECAR_BYTES:
            raise SnapshotError(f"{name}: the sidecar has {size} bytes; at most {MAX_SIDECAR_BYTES} are read")
        raw = file.read(MAX_SIDECAR_BYTES + 1)
    if len(raw) > MAX_SIDECAR_BYTES:
        raise SnapshotError(f"{name}: the sidecar grew past {MAX_SIDECAR_BYTES} bytes while it was read")
    return decode(raw, name)
