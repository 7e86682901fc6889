"""Where pages lie in a file: packed in diffs, at their own offsets in full snapshots and in the diffs of before."""

import base64
import lzma

import numpy as np
import pytest

from dirtylog import DirtyPages
from dirtylog.sinks import snapshot
from dirtylog.sinks._bytes.extents import PackedExtents
from dirtylog.sinks.snapshot import SnapshotError, mapped
from dirtylog.sinks.snapshot import footer as footers
from dirtylog.sinks.snapshot.chain import Layer
from dirtylog.sinks.snapshot.layout import Layout

SIZE, NPAGES = 512, 1501

# Three files, one after the other, as they were written before diffs were packed: a full snapshot and two diffs.
LENGTHS = (770656, 770699, 770699)
BEFORE = """
{Wp48S^xk9=GL@E0stWa8~^|S5YJf5|NmzLtX%*DfICDR*gHN8TX0#>k_m3vBCbm}sOt9s8{pINwotSLuQ{+UHb-
l>#7UAk7SAj`I?#0o#v6$UT#{2bfkvJp_woHzPD=zHwWZ|_?OalbajE5<1L6GHAInpps@)wx)~p7yif+-
>dh<RMQ(|_kS>)wg1qk`a+O7QiQY&=L9$O$n`Q1}J_$g!wJAlh7Y~Qsz@Wj0?U#bs2OJ+il6Au3nllXCXS@;Xh|CK0452<V<)>BHb=~i_P5gswTo
)?4k#pFO84<xugvA=>epUv(Fc^8P6E|iqG<_R_P_%RkLipi7T0{hSPrYYD^aOFkX9l{6{k-
nDFL;g)Cdj@)wi#r_h32{Zy3L@HTl)yKVT4$xRtaYFg)ay~D_$8nqwFd@Q(>emrP>AIta~4XTmQfkL;4LPAmg}ZCww*rKK)LAZA^rDz=mQ`ntZ9e
@uta-^lSWdK{yW_DMS*Yaz-f&Tx57F@1JYk&BjyhThObDGnY-
`cLnNO^NGe4{Od`7<nvuE!Shhz;Ls8eQRZ3X?#O+vGS)#T9E877Q&f#uJ0y|5dNm)cskA0F3uQu35uib_2<@~O)Szi>~;qQZVJw$c=TZ;kmqw&&h
UL57UX+5L9x6is~Te*&Rb!Hv?l1?ZT?(Gx8wXvgB=^O+1`ty+ngTwX9)MRTLXIMjEu3>K52FsM1Og+oBJL`v!C-
l0`NEe+Pd%+HRjC6p_D`}yFOK%uVE0y_2`cCIk;*thd8J<L*;?m?s_EhkQbu2L3!cbI^B9{gOU&(Mg6u>e!n57i~rRbvxD(tHNS|+S=3>K27zB!L
1;c%X(BVX(&%Z1UEn2LTXk@6>X_Zh$jmqGAV@qrPyQE5t73K_*FF0=M(G#7-
^c%hM3&HzUiR3kH^S+*&1s<~P5bOHhfJazV2g6NhVbe*!{pG4<2pXGTsN;syQ0lE8BY+k1dIKg`8%x2Tm?0<2_?*ju&rE?siREBJrWjp5ae|PY-
X^*EIU(xK$ktj59Qi^i*zdY&f#zA^xPx!^~p=ufdO(^4<g~|2&YsjbO+OPr-lR4H^4TilTC2tn{NW7mi=59R>3^`~~kXaGAbIC^B8WheV&BD=k>|
~|f_Wyu;=}nD-k~Jeq5N#fP?W=?5CL^f$28-
GCf7T5fKYe$rgA^fd(banMJ`_`8cC1<C<y!>^`N!I={QFWXbj==HAVT@wQ$6@8WC=Ro$}kUuNDTm+0PJ&9r~SUJd@&lIw~aAwaGs|lU+gH$h0&Fm
ihe4s?-F((&1X8}w@ykEsn<IhegVHfI^*6nq?s|^cKj(LkLalV5<{r<=PG(y&(ug*0Fw(bRrbn#Dd;m|5%k$7n>_7#IoQ3h@-
tjIuBYV1FxGY0Qw{7+2^W`OhQ=2NLCsuLIq?d-BcE{A8a&7#+||wbAh&M!g=ayn00000*<mGGFK(Q~00HR;_KuAKH+<rAvBYQl0ssI200dcD
"""


def memory(step):
    """Return what the files hold, of step 0, 1 and 2, and what may come after them."""
    found = np.zeros(NPAGES * SIZE - 9, np.uint8)
    found[::4000] = 7
    for each in range(1, step + 1):
        found[each * 1000 :: 50_000] = each
        found[-1] = each
    return found


def dirty(step):
    return DirtyPages.from_indices(np.unique(np.flatnonzero(memory(step) != memory(step - 1)) // SIZE), NPAGES, SIZE)


@pytest.fixture
def before(tmp_path):
    raw = lzma.decompress(base64.b85decode(BEFORE.replace("\n", "")))
    for step, length in enumerate(LENGTHS):
        (tmp_path / f"s{step}").write_bytes(raw[:length])
        raw = raw[length:]
    return tmp_path


def layout_of(path):
    with Layer(str(path)) as layer:
        return layer.place.layout


def add(directory, step):
    return snapshot.save_diff(
        directory / f"s{step}", memory(step), dirty(step), parent=directory / f"s{step - 1}", digest="blake2b_128",
        sync=False,
    )  # fmt: skip


def check(path, step):
    assert (snapshot.restore(path) == memory(step)).all()
    assert (snapshot.read(path, rows=slice(900, -1)) == memory(step)[900:-1]).all()
    snapshot.verify(path)
    with snapshot.open(path) as opened:
        assert (opened.array == memory(step)).all()


def test_files_of_before_are_read_and_written_over(before):
    assert [layout_of(before / f"s{step}") for step in range(3)] == [Layout.PLAIN] * 3
    for step in (3, 4):
        add(before, step)
        assert layout_of(before / f"s{step}") is Layout.PACKED
    for step in range(5):
        check(before / f"s{step}", step)
    out = np.zeros_like(memory(0))
    some = dirty(2) | dirty(4)
    snapshot.restore(before / "s4", out=out, only=some)
    for page in some:
        here = slice(page * SIZE, (page + 1) * SIZE)
        assert (out[here] == memory(4)[here]).all()


def test_files_of_before_are_merged_laid_over_and_flattened(before):
    for step in (3, 4, 5):
        add(before, step)
    snapshot.merge(before / "s1", before / "s3")
    assert layout_of(before / "s3") is Layout.PACKED
    check(before / "s5", 5)
    snapshot.rebase(before / "s3", before / "s4")
    check(before / "s3", 4)
    snapshot.rebase(before / "s0", before / "s3")
    check(before / "s0", 4)
    snapshot.flatten(before / "s5")
    assert layout_of(before / "s5") is Layout.PLAIN
    check(before / "s5", 5)


def test_a_diff_is_its_pages_one_after_the_other(tmp_path):
    snapshot.save(tmp_path / "s0", memory(0), page_size=SIZE, sync=False)
    about = add(tmp_path, 1)
    pages = dirty(1).indices()
    assert pages[-1] == NPAGES - 1
    stream = b"".join(memory(1)[page * SIZE : (page + 1) * SIZE].tobytes() for page in pages)
    raw = (tmp_path / "s1").read_bytes()
    offset = footers.TRAILER.unpack(raw[-64:])[2]
    assert raw[: len(stream)] == stream
    assert offset == -(-len(stream) // 4096) * 4096
    assert raw[len(stream) : offset] == bytes(offset - len(stream))
    assert about.allocated <= offset + 4096
    # A full one is the memory.
    assert (tmp_path / "s0").read_bytes()[: memory(0).nbytes] == memory(0).tobytes()


def test_an_empty_diff_is_a_footer(tmp_path):
    snapshot.save(tmp_path / "s0", memory(0), page_size=SIZE, sync=False)
    nothing = DirtyPages._empty(NPAGES, SIZE)
    snapshot.save_diff(tmp_path / "s1", memory(0), nothing, parent=tmp_path / "s0", sync=False)
    assert footers.TRAILER.unpack((tmp_path / "s1").read_bytes()[-64:])[2] == 0
    check(tmp_path / "s1", 0)


def test_long_runs_of_a_packed_diff_are_mapped(tmp_path, monkeypatch):
    array = np.arange(64 * 4096, dtype=np.uint8)
    snapshot.save(tmp_path / "s0", array, sync=False)
    array += 1
    runs = DirtyPages.from_runs([[3, 1], [10, 20], [50, 14]], 64)
    snapshot.save_diff(tmp_path / "s1", array, runs, parent=tmp_path / "s0", sync=False)
    plan, plans = mapped._plan, []
    monkeypatch.setattr(mapped, "_plan", lambda *question: plans.append(plan(*question)) or plans[-1])
    monkeypatch.setattr(mapped, "MAPPED_FROM", 4 * 4096 // mapped.mmap.PAGESIZE)
    with snapshot.open(tmp_path / "s1") as opened:
        for first, count in runs.runs().tolist():
            here = slice(first * 4096, (first + count) * 4096)
            assert (opened.array[here] == array[here]).all()
    if mapped.mmap.PAGESIZE == 4096:
        ((whole, parts),) = plans[1]
        assert (whole // 4096).tolist() == [[10, 20, 1], [50, 14, 21]]
        assert (parts // 4096).tolist() == [[3, 1, 0]]


def test_each_layout_says_where_the_bytes_are():
    assert [Layout.of(kind) for kind in ("full", "diff")] == [Layout.PLAIN, Layout.PACKED]
    assert (Layout.PLAIN.data_bytes(9, 5), Layout.PACKED.data_bytes(9, 5)) == (9, 5)
    held = PackedExtents(DirtyPages.from_indices([1, 2, 5, 9], 10), 10 * 4096 - 96)
    for layout, places in ((Layout.PLAIN, [4096, 5 * 4096, 9 * 4096]), (Layout.PACKED, [0, 2 * 4096, 3 * 4096])):
        lengths = [8192, 4096, 4000]
        pieces = [list(row) for row in zip([4096, 5 * 4096, 9 * 4096], lengths, places, strict=True)]
        assert layout.pieces(0, held.extents).tolist() == pieces
        bytes_of_all = np.concatenate([np.arange(at, at + n) for at, n in zip(places, lengths, strict=True)])
        for begin, end, extents in held.windows(5000):
            # Where each byte is, whichever way it is asked for.
            for found in (layout.window(begin, extents), layout.within(held, extents)):
                each = np.concatenate([np.arange(at, at + length) for at, length in found.tolist()])
                assert (each == bytes_of_all[begin:end]).all()


# ---- made up --------------------------------------------------------------------------------------------------------


def digest_of(path):
    return footers.TRAILER.unpack(path.read_bytes()[-64:])[5].hex().encode()


def forge(path, layout, offset=None, parent=(b"", b"")):
    """Say of a file that it has another layout, more or less data, or another parent, with a digest that matches."""
    raw = path.read_bytes()
    _, _, at, header, length, _, _ = footers.TRAILER.unpack(raw[-64:])
    offset = at if offset is None else offset
    footer = raw[at : at + length].replace(*parent) if any(parent) else raw[at : at + length]
    trailer, _ = footers.trailer(offset, header, [footer], layout)
    path.write_bytes(raw[: min(at, offset)].ljust(offset, b"\0") + footer + trailer)


def refused(path, reason):
    for use in (snapshot.restore, snapshot.open, snapshot.verify):
        with pytest.raises(SnapshotError, match=reason):
            use(path)


def test_only_a_diff_is_packed(before):
    forge(before / "s0", Layout.PACKED)
    refused(before / "s2", "s0: the footer cannot be used: only the pages of a diff are packed")


@pytest.mark.parametrize("offset", [0, 8192, 16384, 1 << 20])
def test_a_packed_file_that_is_shorter_or_longer_than_its_pages_is_refused(before, offset):
    add(before, 3)
    with Layer(str(before / "s3")) as layer:
        held = layer.place.held
    assert 8192 < held < 12288
    forge(before / "s3", Layout.PACKED, offset)
    refused(before / "s3", f"s3: the footer cannot be used: the data is not the {held} bytes it should be")


@pytest.mark.parametrize(("name", "layout"), [("s3", Layout.PLAIN), ("s2", Layout.PACKED)])
def test_a_file_whose_layout_is_said_wrongly_is_refused(before, name, layout):
    add(before, 3)
    forge(before / name, layout)
    refused(before / "s3", f"{name}: the footer cannot be used: the data is not the")


def test_a_parent_whose_layout_is_said_wrongly_is_refused_at_a_glance(tmp_path):
    # With few runs for its pages, a parent is looked at in C first; and it is the very file that its child asks for.
    npages = 1 << 12
    array = np.zeros(npages * SIZE, np.uint8)
    snapshot.save(tmp_path / "s0", array, page_size=SIZE, sync=False)
    for step in (1, 2):
        array[step * SIZE] = step
        pages = DirtyPages.from_indices([step], npages, SIZE)
        snapshot.save_diff(tmp_path / f"s{step}", array, pages, parent=tmp_path / f"s{step - 1}", sync=False)
    with snapshot.open(tmp_path / "s2") as opened:
        assert (opened.array == array).all()
    was = digest_of(tmp_path / "s1")
    forge(tmp_path / "s1", Layout.PLAIN)
    forge(tmp_path / "s2", Layout.PACKED, parent=(was, digest_of(tmp_path / "s1")))
    refused(tmp_path / "s2", "s1: the footer cannot be used: the data is not the")
