"""Snapshots opened without reading them: the same bytes as a restore, copied on write, put back, read in parts."""

import mmap
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import dirtylog as dl
from dirtylog import DirtyPages
from dirtylog.sinks import snapshot
from dirtylog.sinks.snapshot import SnapshotError, index, mapped
from dirtylog.sinks.snapshot._footers import RunTable, diff_header
from dirtylog.sinks.snapshot.chain import find, follow

pytestmark = pytest.mark.usefixtures("mixed_layouts")


def chain_of(directory, diffs=12, nbytes=300 * 4096 - 700, page_size=4096, named=False, seed=0):
    """Write a base and diffs of random pages and runs; return the path of the last one and the memory."""
    rng = np.random.default_rng(seed)
    memory = rng.integers(1, 255, nbytes, dtype=np.uint8)
    what = {"a": memory[: 100 * page_size], "b": memory[100 * page_size :]} if named else memory
    npages = -(-nbytes // page_size)
    snapshot.save(directory / "s0", what, page_size=page_size, sync=False)
    for i in range(1, diffs + 1):
        first = int(rng.integers(0, npages - 20))
        pages = np.unique([*rng.integers(0, npages, 9), *range(first, first + 16), npages - 1])
        for page in pages.tolist():
            memory[page * page_size : (page + 1) * page_size] = rng.integers(0, 255)
        dirty = DirtyPages.from_indices(pages, npages, page_size)
        snapshot.save_diff(directory / f"s{i}", what, dirty, parent=directory / f"s{i - 1}", state={"i": i}, sync=False)
    return directory / f"s{diffs}", memory


@pytest.mark.parametrize("page_size", [512, 4096, 16384])
def test_mapped_memory_is_what_restoring_gives(tmp_path, page_size):
    path, memory = chain_of(tmp_path, page_size=page_size, nbytes=300 * page_size - 100)
    with snapshot.open(path) as opened:
        assert (np.asarray(opened) == memory).all()
        assert opened.state == {"i": 12}
        assert (opened.nbytes, opened.page_size, opened.info) == (memory.nbytes, page_size, snapshot.info(path))


def test_where_the_system_has_larger_pages_than_a_file_has_blocks_the_rest_of_the_base_is_put_back_by_copying(
    tmp_path, monkeypatch
):
    # A multiple of this machine's: what is laid is the same, in larger pieces.
    monkeypatch.setattr(mapped, "mmap", SimpleNamespace(PAGESIZE=16 * mmap.PAGESIZE))
    monkeypatch.setattr(mapped, "GIVEN_BACK", 1)
    path, memory = chain_of(tmp_path, diffs=0)
    with snapshot.open(path) as opened:
        assert (opened.array == memory).all()
        opened.array[:] = 3
        opened.reset()
        assert (opened.array == memory).all()


@pytest.mark.parametrize("limit", [0, 3])
def test_more_runs_than_can_be_mapped_are_copied(tmp_path, monkeypatch, limit):
    path, memory = chain_of(tmp_path)
    monkeypatch.setattr(mapped, "_spare_mappings", lambda: 4 * limit)
    with snapshot.open(path) as opened:
        assert (opened.array == memory).all()


def test_more_runs_than_are_kept_in_order_are_laid_file_by_file(tmp_path, monkeypatch):
    path, memory = chain_of(tmp_path)
    monkeypatch.setattr(index, "MAX_ROWS", 20)
    with snapshot.open(path) as opened:
        assert (opened.array == memory).all()
        opened.array[:] = 3
        opened.reset()
        assert (opened.array == memory).all()
    assert (snapshot.read(path, rows=slice(5000, 900_000)) == memory[5000:900_000]).all()


@pytest.mark.parametrize("page_size", [512, 4096])
@pytest.mark.parametrize("limit", [65530, 40, None])
def test_where_holes_take_room_they_are_not_mapped(tmp_path, monkeypatch, page_size, limit):
    """In a tmpfs, which is simulated here."""
    rng = np.random.default_rng(5)
    memory = np.zeros(200 * 4096 - 300, np.uint8)
    for first in rng.integers(0, 190, 12) * 4096 + 700:
        memory[first : first + int(rng.integers(1, 60_000))] = rng.integers(1, 255)
    memory[-1] = 3
    path = tmp_path / "base"
    about = snapshot.save(path, memory, page_size=page_size, sync=False)
    monkeypatch.setattr(mapped, "holes_take_room", lambda path: True)
    if limit is None:  # more runs than are kept in order
        monkeypatch.setattr(mapped, "MAX_ROWS", 1)
    else:
        monkeypatch.setattr(mapped, "_spare_mappings", lambda: limit)
    with snapshot.open(path) as opened:
        assert (opened.array == memory).all()
        with open("/proc/self/maps", encoding="utf-8") as maps:
            lines = [line.split(maxsplit=5) for line in maps if line.rstrip().endswith(str(path))]
        # As far as it is mapped, the file has data there; the rest was copied.
        held = np.zeros(-(-memory.size // 4096), bool)
        pages = np.arange(about.npages)[memory_pages(memory, page_size).any(axis=1)]
        held[pages * page_size // 4096] = True
        for span, _, offset, *_ in lines:
            begin, end = (int(each, 16) for each in span.split("-"))
            assert held[int(offset, 16) // 4096 : (int(offset, 16) + end - begin) // 4096].all()
        assert bool(lines) == (limit is not None)
        opened.array[:] = 9
        opened.reset()
        assert (opened.array == memory).all()
        opened.array[50_000:90_000] = 7
        opened.reset(DirtyPages.from_runs([[45_000 // page_size, 60_000 // page_size]], opened.npages, page_size))
        assert (opened.array == memory).all()


def memory_pages(memory, page_size):
    """Return memory as rows of pages, filled up with zeros."""
    padded = np.zeros(-(-memory.size // page_size) * page_size, np.uint8)
    padded[: memory.size] = memory
    return padded.reshape(-1, page_size)


FULL = """
import ctypes, os, sys
import numpy as np
from dirtylog.sinks import snapshot

place = sys.argv[1].encode()
libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18
if (
    libc.unshare(CLONE_NEWNS)
    or libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
    or libc.mount(b"none", place, b"tmpfs", 0, b"size=1m")
):
    print("not allowed:", os.strerror(ctypes.get_errno()))
    sys.exit()
memory = np.zeros(8 << 20, np.uint8)
memory[[5, 4_000_000]] = 7
snapshot.save(sys.argv[1] + "/base", memory, sync=False)
with open(sys.argv[1] + "/rest", "wb", buffering=0) as rest:
    try:
        while True:
            rest.write(bytes(4096))
    except OSError:
        pass
with snapshot.open(sys.argv[1] + "/base") as mapped:
    print(int(mapped.array.sum()))
    mapped.array[1_000_000] = 1
    mapped.reset()
    print(int(mapped.array.sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="this system has no tmpfs")
def test_a_snapshot_in_a_tmpfs_that_is_full_is_read(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=False)
    if done.stdout.startswith("not allowed"):
        pytest.skip(done.stdout.strip())
    assert (done.returncode, done.stdout.split()) == (0, ["14", "14"]), done.stderr


def test_arrays_by_name_have_their_own_type_shape_and_order(tmp_path):
    arrays = {"f": np.asfortranarray(np.arange(3000.0).reshape(30, 100)), "n": np.arange(5, dtype=">i2")}
    snapshot.save(tmp_path / "s", arrays)
    with snapshot.open(tmp_path / "s") as opened:
        assert list(opened.regions) == ["f", "n"] == list(opened.names)
        for name, array in arrays.items():
            assert (opened[name].dtype, opened[name].strides) == (array.dtype, array.strides)
            assert (opened[name] == array).all()
        with pytest.raises(KeyError, match="no array 'x'"):
            opened["x"]


def test_what_is_written_stays_here_and_can_be_saved_over_the_same_parent(tmp_path):
    path, memory = chain_of(tmp_path, named=True)
    with snapshot.open(path) as one, snapshot.open(path) as other, dl.track(one.array) as tracker:
        one["b"][7] ^= 255
        assert (other.array == memory).all()
        snapshot.save_diff(tmp_path / "next", one.regions, tracker.harvest(), parent=path)
        assert (snapshot.restore(tmp_path / "next")["b"] == one["b"]).all()
        assert snapshot.info(tmp_path / "next").count == 1
    assert (snapshot.restore(path)["b"] == memory[100 * 4096 :]).all()


def test_mapped_memory_is_write_protected_like_our_own(tmp_path):
    path, _ = chain_of(tmp_path)
    ours = dl.zeros(4096, "uint8")
    with snapshot.open(path) as opened, dl.track(opened.array) as tracker, dl.track(ours) as usual:
        assert tracker.backend == usual.backend
        opened.array.sum()
        assert not tracker.harvest()
        opened.array[9 * 4096] += 1
        assert tracker.harvest().indices().tolist() == [9]


def test_memory_lives_as_long_as_an_array_over_it(tmp_path):
    path, memory = chain_of(tmp_path)
    with snapshot.open(path) as opened:
        part = opened.array[5000:90_000]
    for file in tmp_path.iterdir():
        file.unlink()
    assert (part == memory[5000:90_000]).all()
    with pytest.raises(ValueError, match="closed"):
        opened.array  # noqa: B018


@pytest.mark.parametrize("page_size", [512, 4096])
def test_reset_puts_back_what_was_written_and_nothing_else(tmp_path, page_size):
    path, memory = chain_of(tmp_path, page_size=page_size, nbytes=2000 * page_size - 100)
    npages = -(-memory.nbytes // page_size)
    with snapshot.open(path) as opened:
        opened.array[:] = 7
        # One page, a run that is given back to the system, and the last page, which is short.
        back = DirtyPages.from_runs([[3, 1], [100, 1500], [npages - 1, 1]], npages, page_size)
        assert opened.reset(back) == back
        wanted = np.full(memory.nbytes, 7, np.uint8)
        for first, count in back.runs().tolist():
            here = slice(first * page_size, (first + count) * page_size)
            wanted[here] = memory[here]
        assert (opened.array == wanted).all()
        opened.reset()
        assert (opened.array == memory).all()
        with pytest.raises(ValueError, match="the pages are 5"):
            opened.reset(DirtyPages.from_indices([1], 5, page_size))


@pytest.mark.parametrize("written", [1, 200 << 12])
def test_what_another_thread_closes_in_the_middle_of_a_reset_is_put_back_or_refused(tmp_path, monkeypatch, written):
    path, memory = chain_of(tmp_path, diffs=1)
    real, opened = mapped.extents_of, snapshot.open(path)
    array = opened.array

    def closed_meanwhile(*arguments):
        opened.close()
        return real(*arguments)

    monkeypatch.setattr(mapped, "extents_of", closed_meanwhile)
    array[:written] ^= 1
    dirty = DirtyPages.from_runs([[0, -(-written // 4096)]], opened.npages)
    with pytest.raises(ValueError, match="is closed; open it again"):
        opened.reset(dirty)
    with pytest.raises(ValueError, match="is closed; open it again"):
        opened.restored()
    assert (array[written:] == memory[written:]).all()


def test_reset_of_something_else_is_refused(tmp_path):
    path, memory = chain_of(tmp_path, diffs=1)
    with snapshot.open(path) as opened:
        for dirty in (5, [1, 2], "all"):
            with pytest.raises(TypeError, match="is neither DirtyPages nor a tracker"):
                opened.reset(dirty)
            with pytest.raises(TypeError, match="is neither DirtyPages nor a tracker"):
                snapshot.restore(path, out=memory, only=dirty)


def test_reset_by_a_tracker_starts_clean_again(tmp_path):
    path, memory = chain_of(tmp_path)
    with snapshot.open(path) as opened, dl.track(opened.array) as tracker:
        for attempt in range(3):
            opened.array[4096 * (10 + attempt)] ^= 1
            opened.array[4096 * 200] ^= 1
            assert opened.reset(tracker).indices().tolist() == [10 + attempt, 200]
            assert (opened.array == memory).all()
            assert not tracker.peek()


def test_reset_puts_back_what_is_written_between_its_two_looks(tmp_path):
    path, memory = chain_of(tmp_path)

    class Late:
        """Looks once, and has more at the harvest."""

        def __init__(self):
            self.answers = [[1], [1, 2], [2]]

        def peek(self):
            return DirtyPages.from_indices(self.answers.pop(0), 300)

        harvest = peek

    with snapshot.open(path) as opened:
        opened.array[: 3 * 4096] = 9
        assert opened.reset(Late()).indices().tolist() == [1, 2]
        assert (opened.array[4096 : 3 * 4096] == memory[4096 : 3 * 4096]).all()
        assert (opened.array[:4096] == 9).all()


def test_a_part_is_read_without_the_rest(tmp_path):
    path, memory = chain_of(tmp_path, named=True)
    assert (snapshot.read(path, region="b") == memory[100 * 4096 :]).all()
    for rows in (slice(70_000, 200_000), slice(9, 2, -3), [5, 6, 90_000, 1], np.array([], int), slice(0, 0)):
        assert (snapshot.read(path, region="b", rows=rows) == memory[100 * 4096 :][rows]).all()
    assert snapshot.read(path, region="a", rows=5) == memory[5]
    with pytest.raises(KeyError, match="name one of them"):
        snapshot.read(path)
    with pytest.raises(IndexError, match="row 409600"):
        snapshot.read(path, region="a", rows=[409600])


def test_the_footers_are_looked_through_as_they_are_followed(tmp_path):
    path, _ = chain_of(tmp_path, named=True)
    found = index.index(str(path))
    links, footer = follow(str(path))
    assert [file[:2] for file in found.files] == [(link.path, link.digest) for link in links]
    for name, _, offset in found.files:
        with open(name, "rb") as file:
            assert offset == index.footers.TRAILER.unpack(file.read()[-64:])[2]
    assert found.footer == footer


def test_a_diff_is_read_at_a_glance(tmp_path, monkeypatch):
    path, memory = chain_of(tmp_path, page_size=512, nbytes=3000 * 512)
    looked = []
    monkeypatch.setattr(index, "find", lambda *question: looked.append(question[0]) or find(*question))
    with snapshot.open(path) as opened:
        assert (opened.array == memory).all()
    assert looked == ["s0"]


def test_a_diff_that_is_another_one_or_damaged_is_refused_by_name(tmp_path):
    # Of so many pages that a diff's set is kept as runs, which is what is followed at a glance.
    options = {"page_size": 512, "nbytes": 3000 * 512}
    path, _ = chain_of(tmp_path, **options)
    (tmp_path / "other").mkdir()
    chain_of(tmp_path / "other", seed=1, **options)
    whole = (tmp_path / "s5").read_bytes()
    # In the set of pages, in the digests of the data, and at the end of the state.
    *_, offset, header, _, _, _ = index.footers.TRAILER.unpack(whole[-64:])
    damaged = []
    for at in (offset + header + 8, len(whole) - 64 - 20, len(whole) - 65):
        changed = bytearray(whole)
        changed[at] ^= 1
        damaged.append(bytes(changed))
    for content in ((tmp_path / "other" / "s5").read_bytes(), *damaged, whole[:-1], b""):
        (tmp_path / "s5").write_bytes(content)
        with pytest.raises(SnapshotError, match="/s5"):
            snapshot.open(path)
    (tmp_path / "s5").write_bytes(whole)
    snapshot.open(path).close()


def test_a_file_that_was_replaced_is_not_laid(tmp_path):
    path, memory = chain_of(tmp_path)
    opened = snapshot.open(path)
    (tmp_path / "s5").unlink()
    with pytest.raises(SnapshotError, match="s6"):
        opened.array  # noqa: B018
    opened.close()
    (tmp_path / "other").mkdir()
    other, _ = chain_of(tmp_path / "other", seed=1)
    late = snapshot.open(other)
    snapshot.save(other, memory, replace=True)
    with pytest.raises(SnapshotError, match="another snapshot"):
        late.array  # noqa: B018
    late.close()


@pytest.mark.parametrize("trailer", [False, True])
def test_a_file_that_was_cut_is_refused_before_it_is_mapped(tmp_path, trailer):
    path, _ = chain_of(tmp_path)
    opened = snapshot.open(path)
    end = (tmp_path / "s0").read_bytes()[-64:]
    with (tmp_path / "s0").open("r+b") as file:
        file.truncate(4096)
        if trailer:
            file.seek(4096)
            file.write(end)
    with pytest.raises(SnapshotError, match="/s0"):
        opened.array  # noqa: B018
    opened.close()


@pytest.mark.parametrize("verify", [True, "background"])
def test_damage_is_found_at_the_time_that_was_asked_for(tmp_path, verify):
    path, _ = chain_of(tmp_path)
    with snapshot.open(path, verify=verify) as opened:
        assert opened.verify().count == snapshot.info(path).count
    with (tmp_path / "s0").open("r+b") as file:
        file.seek(5000)
        file.write(b"damaged")
    with pytest.raises(SnapshotError, match="does not match"):
        snapshot.open(path, verify=verify).verify()
    with pytest.raises(ValueError, match="verify is 'later'"):
        snapshot.open(path, verify="later")


def test_runs_are_composed_newest_first():
    rng = np.random.default_rng(0)
    for _ in range(100):
        table, owner = RunTable(1000), np.zeros(64, int)
        packed = rng.random(9) < 0.5
        layers = [np.flatnonzero(rng.random(64) < 0.3) for _ in range(int(rng.integers(0, 9)))]
        for number in range(len(layers), 0, -1):  # oldest first, into the oracle
            owner[layers[number - 1]] = number
        for number, pages in enumerate(layers, 1):
            runs = DirtyPages.from_indices(pages, 64).runs()
            table.add([runs[:3], runs[3:]], number, packed=packed[number])
        found = np.zeros(64, int)
        for first, count, number, place in table.composed().tolist():
            assert place == (layers[number - 1].searchsorted(first) if packed[number] else first)
            assert (found[first : first + count] == 0).all()
            found[first : first + count] = number
        assert (found == owner).all()


def test_runs_that_do_not_ascend_or_reach_past_the_end_are_refused():
    for runs in ([[5, 1], [3, 1]], [[0, 2], [2, 1]], [[9, 2]], [[-1, 1]], [[3, 0]], [[1, 2**63 - 1]], [[11, 1]]):
        text = np.array(runs, "<i8").tobytes()
        assert RunTable(9).take(text, 0, len(runs), 10, 1) is None
        assert RunTable(9).take(text, 0, len(runs) + 1, 10, 1) is None


def test_a_header_that_is_not_written_as_a_writer_writes_it_needs_a_closer_look(tmp_path):
    path, _ = chain_of(tmp_path, diffs=2)
    with index.Layer(str(path)) as layer:
        text = index.footers.header_text(layer.footer)
        alike = index._alike(layer.footer)
    assert diff_header(text, len(text), *alike)[2] == "s1"
    for old, new in [
        (b'"s1"', b'"/1"'), (b'"s1"', b'".1"'), (b'"exact":true', b'"exact":1   '), (b'"holds":null', b'"holds":nul!'),
        (b'"count":', b'"count":0'), (b'"state":', b'"state":-'), (b"\n", b" "), (b'"diff"', b'"full"'),
    ]:  # fmt: skip
        assert old in text
        changed = text.replace(old, new)
        assert diff_header(changed, len(changed), *alike) is None
        assert diff_header(changed + b" " * (-len(changed) % 16), -(-len(changed) // 16) * 16, *alike) is None


def test_a_child_of_a_fork_has_its_own_memory(tmp_path):
    path, memory = chain_of(tmp_path)
    with snapshot.open(path) as opened:
        array = opened.array
        array[0] ^= 1
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            array[1] ^= 1
            os.write(write, b"y" if array[0] == memory[0] ^ 1 else b"n")
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 1) == b"y"
        assert array[1] == memory[1]
        os.close(read), os.close(write)


@pytest.mark.parametrize("limit", [index.MAX_ROWS, 20])
@pytest.mark.parametrize("named", [False, True])
def test_restoring_only_some_pages_leaves_the_others(tmp_path, monkeypatch, named, limit):
    path, memory = chain_of(tmp_path, named=named)
    monkeypatch.setattr(index, "MAX_ROWS", limit)
    junk = np.full(memory.nbytes, 7, np.uint8)
    out = {"a": junk[: 100 * 4096], "b": junk[100 * 4096 :]} if named else junk
    back = DirtyPages.from_indices([0, 5, 6, 7, 99, 100, 120, 299], 300)
    assert snapshot.restore(path, out=out, only=back) is out
    wanted = np.full(memory.nbytes, 7, np.uint8)
    for page in back:
        wanted[page * 4096 : page * 4096 + 4096] = memory[page * 4096 : page * 4096 + 4096]
    assert (junk == wanted).all()


@pytest.mark.parametrize("named", [False, True])
def test_restoring_what_a_tracker_saw_starts_it_clean(tmp_path, named):
    path, memory = chain_of(tmp_path, named=named)
    whole = dl.zeros(300 * 4096, "uint8")[: memory.nbytes]
    whole[:] = memory
    out = {"a": whole[: 100 * 4096], "b": whole[100 * 4096 :]} if named else whole
    # Pages that are not dirty are not looked at: a difference that nobody reported stays.
    whole[50 * 4096] ^= 1
    with dl.track(whole[: 100 * 4096]) as one, dl.track(whole[100 * 4096 :]) as other, dl.track(whole) as both:
        whole[[3 * 4096, 130 * 4096, memory.nbytes - 1]] ^= 1
        snapshot.restore(path, out=out, only={"a": one, "b": other} if named else both)
        assert (whole != memory).nonzero()[0].tolist() == [50 * 4096]
        for tracker in (one, other) if named else (both,):
            assert not tracker.peek()


def test_restoring_only_some_pages_needs_memory_that_fits(tmp_path):
    path, memory = chain_of(tmp_path, named=True)
    out = {"a": memory[: 100 * 4096].copy(), "b": memory[100 * 4096 :].copy()}
    some = DirtyPages.from_indices([1], 5)
    with pytest.raises(ValueError, match="pass it as out="):
        snapshot.restore(path, only=some)
    with pytest.raises(ValueError, match="the pages are 5"):
        snapshot.restore(path, out=out, only=some)
    with pytest.raises(ValueError, match="the array 'b' of"):
        snapshot.restore(path, out=out, only={"b": some})
    with pytest.raises(ValueError, match="only has"):
        snapshot.restore(path, out=out, only={"c": some})


def test_bytes_of_a_chain_are_found_by_range():
    starts, stops = np.array([0, 10, 30]), np.array([10, 20, 31])
    wanted = np.array([[5, 7], [19, 12], [40, 3]])
    at, found = index.overlap(starts, stops, wanted)
    assert at.tolist() == [0, 1, 1, 2]
    assert found.tolist() == [[5, 5], [10, 2], [19, 1], [30, 1]]


MANY_RUNS = """
import resource, sys
import numpy as np
from dirtylog.sinks import snapshot
from dirtylog.sinks.snapshot import footer as footers, index
directory, npages, size = sys.argv[1], 1 << 24, 512
end, rows, own = npages * size, index.MAX_ROWS // 4, None
for i in range(5):
    # Each beside those of the others, and none next to another: as many runs as there can be.
    pages = np.arange(rows) * 16 + 2 * i
    footer = footers.Footer(
        id="0" * 32, kind="diff" if i else "full", page_size=size, nbytes=end, count=rows, rows=rows, exact=True,
        parent=f"s{i - 1}" if i else None, parent_digest=own, holds=None, time=0, epoch=None, algorithm="blake2b_128",
        named=False, regions=(("", "|u1", (end,), "C", 0, end),), state=0,
    )
    header = footers.header_text(footer)
    runs = np.stack([pages, np.ones(rows, np.int64)], axis=1)
    sections = [header, runs.tobytes(), bytes(16 * -(-rows * size >> 20))]
    trailer, own = footers.trailer(end, len(header), sections)
    with open(f"{directory}/s{i}", "wb") as file:
        file.seek(end)
        file.write(b"".join([*sections, trailer]))
snapshot.read(f"{directory}/s0", rows=slice(0, 4096))

def limit(more):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more + (32 << 20), resource.RLIM_INFINITY))

limit(0)
assert not snapshot.read(f"{directory}/s4", rows=slice(16 * size, 80 * size)).any()
limit(end)
with snapshot.open(f"{directory}/s4") as opened:
    assert opened._index.rows is not None
    assert opened.array[-1] == 0
"""


@pytest.mark.usefixtures("bounded")
def test_as_many_runs_as_are_composed_take_little_memory(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", MANY_RUNS, str(tmp_path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
