"""Targets: footers and files of snapshots, traces."""

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import dirtylog as dl
from dirtylog.sinks import snapshot
from dirtylog.sinks.snapshot import footer as footers
from dirtylog.sinks.snapshot.chain import Layer
from dirtylog.sinks.snapshot.layout import Layout
from dirtylog.sinks.trace import Recorder, Trace, TraceError, layout
from fuzz.target import Target, Wrong

__all__ = ["Footer", "Snapshot", "TraceFile"]

LIMIT = 1 << 22


def sealed(data: bytes, kind: Layout) -> bytes:
    """Make a footer of a header's line and what follows it, with the form, lengths and digest that it should have."""
    line, _, rest = data.partition(b"\n")
    nbytes = 0
    try:
        body = json.loads(line.decode("ascii"))
        line = json.dumps(body, separators=(",", ":")).encode("ascii")
        nbytes = body["nbytes"] if kind is Layout.PLAIN else body["count"] * body["page_size"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    header = line + b" " * (-(len(line) + 1) % 16) + b"\n"
    offset = footers.footer_offset(nbytes if type(nbytes) is int and 0 < nbytes <= LIMIT else 20 * 512)
    trailer, _ = footers.trailer(offset, len(header), [header, rest], kind)
    return header + rest + trailer


def footer_of(path: Path) -> bytes:
    """Return the footer of a snapshot without its trailer."""
    raw = path.read_bytes()
    return raw[footers.TRAILER.unpack(raw[-footers.TRAILER.size :])[2] : -footers.TRAILER.size]


def memory() -> np.ndarray:
    """Return what the seeds are snapshots of."""
    memory = np.zeros(20 * 512 - 9, np.uint8)
    memory[::1500] = 7
    return memory


class Footer(Target):
    """`Layer`: the footer of a snapshot, as it is or with lengths and a digest that fit, plain or packed."""

    name = "footer"
    refusals = (footers.SnapshotError,)

    def seeds(self) -> Iterator[bytes]:
        """Yield the footers of a full snapshot and a diff, as they are and to be sealed."""
        path = self.directory / "base"
        snapshot.save(path, memory(), page_size=512, digest="blake2b_128", sync=False)
        some = dl.DirtyPages.from_indices([1, 2, 19], 20, 512, exact=False)
        snapshot.save_diff(self.directory / "diff", memory(), some, parent=path, epoch=3, sync=False)
        arrays = {"w": np.ones((30, 40)), "b": np.ones(5, ">i2")}
        snapshot.save(self.directory / "named", arrays, page_size=512, state={"step": 3, "rng": b"\0\1"}, sync=False)
        for name in ("base", "diff", "named"):
            raw = (self.directory / name).read_bytes()
            offset = footers.TRAILER.unpack(raw[-footers.TRAILER.size :])[2]
            yield b"=" + raw[offset:]
            yield (b"-" if name == "diff" else b"+") + footer_of(self.directory / name)
            (self.directory / name).unlink()

    def prepare(self, data: bytes) -> bytes:
        """Write a file of zeros with the footer, which is sealed if the input begins with a plus or a minus."""
        kind = {b"+": Layout.PLAIN, b"-": Layout.PACKED}.get(data[:1])
        text = data[1:] if kind is None else sealed(data[1:], kind)
        offset = 0
        if len(text) >= footers.TRAILER.size:
            offset = footers.TRAILER.unpack(text[-footers.TRAILER.size :])[2]
        with open(self.directory / "it", "wb") as file:
            file.seek(offset if offset <= LIMIT else 0)
            file.write(text)
        return data

    def read(self, data: bytes) -> object:
        """Check it, and go through its pages, its windows and its state."""
        with Layer(str(self.directory / "it")) as layer:
            pages = layer.pages() if layer.footer.npages <= LIMIT else None
            return layer.footer, pages, sum(size for size, _ in layer.windows()), layer.total, layer.state()

    def judge(self, data: bytes, answer: object) -> None:
        """What was accepted holds as many pages, in as many runs and bytes, as it says."""
        footer, pages, windows, total, _ = answer
        if windows != total:
            raise Wrong("the windows are not what the pages hold")
        if pages is not None and (pages.count, len(pages.runs())) != (footer.count, footer.rows):
            raise Wrong("the page set is not what the header says")


class Snapshot(Target):
    """`restore`, `verify` and `info`: a directory with a base, and a diff whose footer and data are made up."""

    name = "snapshot"
    refusals = (footers.SnapshotError, ValueError)

    def seeds(self) -> Iterator[bytes]:
        """Yield a diff in each layout: which, its data, then its footer."""
        snapshot.save(self.directory / "base", memory(), page_size=512, digest="blake2b_128", sync=False)
        changed = memory()
        changed[512:1024] = 3
        changed[-1] = 4
        pages = dl.DirtyPages.from_indices([1, 19], 20, 512)
        path = self.directory / "diff"
        snapshot.save_diff(path, changed, pages, parent=self.directory / "base", digest="blake2b_128", sync=False)
        packed = path.read_bytes()[:4096]
        yield b"-" + packed.ljust(20 * 512, b"\0") + footer_of(path)
        plain = bytes(512) + packed[:512] + bytes(17 * 512) + packed[512:1024]
        yield b"+" + plain + footer_of(path)

    def prepare(self, data: bytes) -> bytes:
        """Write the file; the footer is sealed."""
        text = sealed(data[1 + 20 * 512 :], Layout.PACKED if data[:1] == b"-" else Layout.PLAIN)
        offset = footers.TRAILER.unpack(text[-footers.TRAILER.size :])[2]
        with open(self.directory / "diff", "wb") as file:
            file.write(data[1 : 1 + min(20 * 512, offset)])
            file.seek(offset)
            file.write(text)
        self.before = self.listing()
        return data

    def read(self, data: bytes) -> object:
        """Restore."""
        snapshot.info(self.directory / "diff")
        return snapshot.restore(self.directory / "diff", limit=LIMIT)

    def judge(self, data: bytes, answer: object) -> None:
        """What was restored is the base with the file's pages over it, and nothing new lies in the directory."""
        with Layer(str(self.directory / "diff")) as layer:
            footer, held, place = layer.footer, layer.pages(), layer.place
        size = footer.page_size
        content = np.frombuffer((self.directory / "diff").read_bytes(), np.uint8)[: place.data]
        expected = memory() if footer.kind == "diff" else np.zeros(footer.nbytes, np.uint8)
        for rank, page in enumerate(held):
            at = (rank if place.layout is Layout.PACKED else page) * size
            expected[page * size : (page + 1) * size] = content[at : at + size]
        parts = list(answer.values()) if isinstance(answer, dict) else [answer]
        for part, row in zip(parts, footer.regions, strict=True):
            if part.tobytes("A") != expected[row[4] : row[4] + row[5]].tobytes():
                raise Wrong("the memory that was restored is not what the files hold")
        if self.listing() != self.before:
            raise Wrong("the directory has changed")


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
