"""Targets: sidecars and files of snapshots, traces."""

import json
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import dirtylog as dl
from dirtylog.sinks import snapshot
from dirtylog.sinks.snapshot import sidecar as sidecars
from dirtylog.sinks.trace import Recorder, Trace, TraceError, layout
from fuzz.target import Target, Wrong

__all__ = ["Sidecar", "Snapshot", "TraceFile"]

LIMIT = 1 << 22


def repaired(text: bytes) -> bytes:
    """Give a sidecar the form and the digest it should have, so that what is in it is looked at."""
    try:
        body = json.loads(text.decode("ascii"))
        body.pop("digest", None)
        digest = sidecars.hasher(body["algorithm"])(sidecars._canonical(body))
        return sidecars._canonical({**body, "digest": digest})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return text


def memory() -> np.ndarray:
    """Return what the seeds are snapshots of."""
    memory = np.zeros(20 * 512 - 9, np.uint8)
    memory[::1500] = 7
    return memory


class Sidecar(Target):
    """`sidecar.decode`: the text beside a snapshot, as it is or with a digest that fits."""

    name = "sidecar"
    refusals = (sidecars.SnapshotError,)

    def seeds(self) -> Iterator[bytes]:
        """Yield the sidecars of a full snapshot and a diff, as they are and to be repaired."""
        path = self.directory / "base"
        snapshot.save(path, memory(), page_size=512, digest="blake2b_128", sync=False)
        some = dl.DirtyPages.from_indices([1, 2, 19], 20, 512, exact=False)
        snapshot.save_diff(self.directory / "diff", memory(), some, parent=path, epoch=3, sync=False)
        for name in ("base", "diff"):
            text = (self.directory / f"{name}.json").read_bytes()
            yield b"=" + text
            yield b"+" + text

    def prepare(self, data: bytes) -> bytes:
        """Repair what begins with a plus."""
        return repaired(data[1:]) if data[:1] == b"+" else data[1:]

    def read(self, data: bytes) -> object:
        """Decode it, and unpack its pages where the bitmap is within the fuzzer's memory."""
        sidecar, digest = sidecars.decode(data, "it")
        return sidecar, digest, sidecar.pages()

    def judge(self, data: bytes, answer: object) -> None:
        """What was accepted is, byte for byte, what would have been written."""
        sidecar, digest, pages = answer
        if sidecars.encode(sidecar) != (data, digest) or pages.count != sidecar.count:
            raise Wrong("the sidecar is not what it would be written as")


class Snapshot(Target):
    """`restore`, `verify` and `info`: a directory with a base, and a diff whose two files are made up."""

    name = "snapshot"
    refusals = (sidecars.SnapshotError, ValueError)

    def seeds(self) -> Iterator[bytes]:
        """Yield a diff: its sidecar, a zero byte, its data."""
        snapshot.save(self.directory / "base", memory(), page_size=512, digest="blake2b_128", sync=False)
        changed = memory()
        changed[512:1024] = 3
        pages = dl.DirtyPages.from_indices([1], 20, 512)
        path = self.directory / "diff"
        snapshot.save_diff(path, changed, pages, parent=self.directory / "base", digest="blake2b_128", sync=False)
        yield (self.directory / "diff.json").read_bytes() + b"\0" + path.read_bytes()

    def prepare(self, data: bytes) -> bytes:
        """Write both files; the sidecar gets a digest that fits."""
        text, _, content = data.partition(b"\0")
        (self.directory / "diff.json").write_bytes(repaired(text))
        (self.directory / "diff").write_bytes(content)
        self.before = self.listing()
        return data

    def read(self, data: bytes) -> object:
        """Restore."""
        snapshot.info(self.directory / "diff")
        return snapshot.restore(self.directory / "diff", limit=LIMIT)

    def judge(self, data: bytes, answer: object) -> None:
        """What was restored is the base with the file's pages over it, and nothing new lies in the directory."""
        sidecar, _ = sidecars.read(str(self.directory / "diff"))
        held, size = sidecar.pages(), sidecar.page_size
        content = np.frombuffer((self.directory / "diff").read_bytes(), np.uint8)
        expected = memory() if sidecar.kind == "diff" else np.zeros(sidecar.nbytes, np.uint8)
        for page in held:
            expected[page * size : (page + 1) * size] = content[page * size : (page + 1) * size]
        if not np.array_equal(answer, expected) or self.listing() != self.before:
            raise Wrong("the memory that was restored is not what the files hold, or the directory has changed")


class TraceFile(Target):
    """`Trace`: a Parquet file with checksums; everything in it made up."""

    name = "trace"
    row = np.dtype([("time", "<f8"), ("epoch", "<i8"), ("first", "<i8"), ("count", "<i8"), ("exact", "u1")])
    refusals = (TraceError,)

    def seeds(self) -> Iterator[bytes]:
        """Yield a short trace."""
        path = self.directory / "seed"
        with Recorder(path, 1000) as recorder:
            recorder.regions["all"] = (0, 1000)
            for number in range(3):
                recorder.write(number / 2, dl.DirtyPages.from_indices(range(number, 1000, 300), 1000, exact=number < 2))
        yield b"=" + path.read_bytes()
        rows = pq.read_table(path)
        header = pq.read_metadata(path).metadata[layout.METADATA_KEY]
        yield b"+" + header + b"\0" + np.rec.fromarrays(list(map(np.asarray, rows.columns)), dtype=self.row).tobytes()
        path.unlink()

    def prepare(self, data: bytes) -> bytes:
        """Write the file as it is, or a sound Parquet file of the header and rows that follow a plus."""
        path = self.directory / "trace"
        if data[:1] != b"+":
            path.write_bytes(data[1:])
            return data
        header, _, rows = data[1:].partition(b"\0")
        rows = np.frombuffer(rows[: len(rows) // self.row.itemsize * self.row.itemsize], self.row)
        columns = {name: rows[name] & 1 == 1 if name == "exact" else rows[name].copy() for name in layout.COLUMNS}
        schema = pa.schema([pa.field(name, pa.type_for_alias(kind), False) for name, kind in layout.COLUMNS.items()])
        with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
            writer.add_key_value_metadata({layout.METADATA_KEY: header})
            writer.write_table(pa.table(columns, schema=schema))
        return data

    def read(self, data: bytes) -> object:
        """Read every epoch; a page space is as large as the fuzzer's memory takes."""
        with mock.patch.object(layout, "MAX_TRACE_PAGES", 1 << 24), Trace(self.directory / "trace") as trace:
            return trace.npages, trace.length, list(trace.epochs())

    def judge(self, data: bytes, answer: object) -> None:
        """Epochs are numbered, in order of time, and of the page space that was announced."""
        npages, length, epochs = answer
        times = [epoch.time for epoch in epochs]
        if [epoch.number for epoch in epochs] != list(range(1, length + 1)) or times != sorted(times):
            raise Wrong("the epochs are not in order")
        if any(epoch.pages.npages != npages for epoch in epochs):
            raise Wrong("an epoch is of another page space")
