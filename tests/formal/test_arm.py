"""The checker for Arm gives the published verdicts on well-known tests, and what it demands of the headers."""

import dataclasses
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
X, Y, Z = 0x1000, 0x2000, 0x3000
# Two registers that were read, in the one that is returned.
PACK = "lsl x3, x3, 1; orr x0, x3, x4"
STORES = "mov x3, 1; str x3, [x0]; {}; str x3, [x1]"


@pytest.fixture
def arm(monkeypatch):
    """The package beside the tests; it is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    from formal.arm import __main__, catalog, code, model

    return dataclasses.make_dataclass("Arm", ["main", "catalog", "code", "model"])(__main__, catalog, code, model)


def ends(arm, *threads):
    """What the threads return and what x and y hold at the end, in every execution."""
    programs = [[line.strip() for line in text.split(";") if line.strip()] for text in threads]
    run = arm.model.outcomes([arm.code.Thread(program, (X, Y, Z)) for program in programs], {X: 0, Y: 0, Z: 0})
    return {(*outcome.returned, outcome.memory[X], outcome.memory[Y]) for outcome in run}


@pytest.mark.parametrize(
    ("store", "both_may_read_the_old"),
    [
        ("str x3, [x0]", True),
        ("stlr x3, [x0]", True),
        ("str x3, [x0]; dmb ish", False),
        ("str x3, [x0]; dmb ishst", True),
        ("swp x3, x4, [x0]", True),
        ("swpal x3, x4, [x0]", False),
        # The store of a pair may be seen after a load that follows it: Linux puts a barrier behind such a pair.
        (".L1:; ldaxr x4, [x0]; stlxr w5, x3, [x0]; cbnz w5, .L1", True),
        (".L1:; ldaxr x4, [x0]; stlxr w5, x3, [x0]; cbnz w5, .L1; dmb ish", False),
    ],
)
def test_store_buffering(arm, store, both_may_read_the_old):
    one = f"mov x3, 1; {store}; ldr x0, [x1]"
    other = f"mov x3, 1; {store.replace('[x0]', '[x1]')}; ldr x0, [x0]"
    assert any(end[:2] == (0, 0) for end in ends(arm, one, other)) == both_may_read_the_old


@pytest.mark.parametrize(("load", "may"), [("ldar", False), ("ldapr", True), ("ldr", True)])
def test_a_release_comes_before_a_later_acquire_and_not_before_ldapr(arm, load, may):
    one, other = (f"mov x3, 1; stlr x3, [{mine}]; {load} x0, [{its}]" for mine, its in (("x0", "x1"), ("x1", "x0")))
    assert any(end[:2] == (0, 0) for end in ends(arm, one, other)) == may


@pytest.mark.parametrize(
    ("writer", "reader", "may_miss"),
    [
        (STORES.format("mov x9, 0"), f"ldr x3, [x1]; ldr x4, [x0]; {PACK}", True),
        (STORES.format("dmb ish"), f"ldr x3, [x1]; ldr x4, [x0]; {PACK}", True),
        (STORES.format("dmb ish"), f"ldr x3, [x1]; eor x5, x3, x3; ldr x4, [x0, x5]; {PACK}", False),
        (STORES.format("dmb ish"), f"ldr x3, [x1]; cbz x3, .L1; .L1:; ldr x4, [x0]; {PACK}", True),
        (STORES.format("dmb ish"), f"ldr x3, [x1]; cbz x3, .L1; .L1:; isb; ldr x4, [x0]; {PACK}", False),
        (STORES.format("dmb ishst"), f"ldr x3, [x1]; dmb ishld; ldr x4, [x0]; {PACK}", False),
        ("mov x3, 1; str x3, [x0]; stlr x3, [x1]", f"ldar x3, [x1]; ldr x4, [x0]; {PACK}", False),
        ("mov x3, 1; str x3, [x0]; stlr x3, [x1]", f"ldapr x3, [x1]; ldr x4, [x0]; {PACK}", False),
        # Published as PPOCA and PPOAA: a store that depends on the branch may be read early, on the address not.
        (
            STORES.format("dmb ish"),
            "ldr x3, [x1]; cbz x3, .L1; mov x6, 1; str x6, [x2]; ldr x5, [x2]; eor x5, x5, x5; ldr x4, [x0, x5]; "
            f"{PACK}; ret; .L1:; mov x0, 0",
            True,
        ),
        (
            STORES.format("dmb ish"),
            "ldr x3, [x1]; eor x6, x3, x3; mov x7, 1; str x7, [x2, x6]; ldr x5, [x2]; eor x5, x5, x5; "
            f"ldr x4, [x0, x5]; {PACK}",
            False,
        ),
    ],
)
def test_message_passing(arm, writer, reader, may_miss):
    assert any(end[1] == 2 for end in ends(arm, writer, reader)) == may_miss


@pytest.mark.parametrize(
    ("between", "may"),
    [("mov x3, 1", True), ("eor x3, x4, x4; add x3, x3, 1", False), ("cbz x4, .L1; .L1:; mov x3, 1", False)],
)
def test_load_buffering(arm, between, may):
    one, other = (
        f"ldr x4, [{mine}]; {between}; str x3, [{its}]; mov x0, x4" for mine, its in (("x0", "x1"), ("x1", "x0"))
    )
    assert any(end[:2] == (1, 1) for end in ends(arm, one, other)) == may


def test_two_readers_agree_on_the_order_of_two_writers(arm):
    writers = "mov x3, 1; str x3, [x0]", "mov x3, 1; str x3, [x1]"
    for dependency, may in (("mov x5, 0", True), ("eor x5, x3, x3", False)):
        readers = (
            f"ldr x3, [{first}]; {dependency}; ldr x4, [{second}, x5]; {PACK}"
            for first, second in (("x0", "x1"), ("x1", "x0"))
        )
        assert any(end[2:4] == (2, 2) for end in ends(arm, *writers, *readers)) == may


def test_one_place_is_coherent_and_no_increment_is_lost(arm):
    assert not any(end[1] == 2 for end in ends(arm, "mov x3, 1; str x3, [x0]", f"ldr x3, [x0]; ldr x4, [x0]; {PACK}"))
    by_pair = "mov x3, 1; .L1:; ldxr x4, [x0]; add x4, x4, x3; stxr w5, x4, [x0]; cbnz w5, .L1"
    assert {end[2] for end in ends(arm, "mov x3, 1; ldadd x3, x4, [x0]", by_pair)} == {2}


def test_an_instruction_that_is_not_modelled_is_refused(arm):
    for line in ("casp x2, x3, x4, x5, [x0]", "ldr q0, [x0]", "ldr x3, [x0, 8]!"):
        with pytest.raises(arm.code.UnknownInstruction):
            ends(arm, line)


def test_every_thread_that_is_written_is_used(arm):
    source = (ROOT / "formal" / "arm" / "threads.c").read_text()
    used = {name for test in arm.catalog.TESTS for name in test.threads}
    assert {name for name in used if f"THREAD({name})" not in source} == set()
    assert source.count("\nTHREAD(") == len(used)


@pytest.fixture
def compiler(arm):
    if shutil.which(arm.main.COMPILER) is None:
        pytest.skip(f"no {arm.main.COMPILER} (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross)")


@pytest.mark.usefixtures("compiler")
def test_what_is_right_holds_and_what_is_wrong_is_refuted(arm, capsys):
    names = ("batch, set", "batch, clear, set", "three levels, mark, *", "no fence *", "test instead of fetch-or")
    assert arm.main.main([part for name in names for part in ("--only", name)]) == 0
    assert "refuted" in capsys.readouterr().out


@pytest.mark.usefixtures("compiler")
def test_a_verdict_that_is_not_the_one_demanded_fails_the_run(arm, monkeypatch, capsys):
    (wrong,) = [test for test in arm.catalog.TESTS if test.name == "no fence at the end"]
    monkeypatch.setattr(arm.main, "TESTS", (dataclasses.replace(wrong, may_be=()),))
    assert arm.main.main([]) == 1
    assert "1 not as demanded" in capsys.readouterr().out
