"""``dirtylog migrate --postcopy``: what it moves, and what does not go with it."""

import json
from pathlib import Path

import numpy as np
import pytest

from dirtylog import BackendUnavailable, Checkpoint, DirtyLogError, track, zeros
from dirtylog.commands import migrate
from dirtylog.commands._refusal import Misunderstood
from dirtylog.sinks import snapshot
from dirtylog.sinks.migrate._postcopy import Faults
from dirtylog.sinks.migrate.policy import Round

from .test_snapshot_and_migrate import run

PAGE = 4096


@pytest.fixture
def guards():
    """Skip where no memory can be guarded."""
    try:
        Faults([(0, zeros(PAGE, np.uint8))], PAGE, PAGE, np.ones(1, np.uint64), bytes(16)).release()
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("when", [[], ["--run", "at-once"], ["--run", "filled"]])
@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.usefixtures("guards")
def test_memory_that_is_written_goes_over_while_the_copy_may_run(migrated, rounds, when):
    try:
        track(np.zeros(1 << 16, np.uint8)).close()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    received, sent = migrated(["--demo", "--size", 4, "--postcopy", rounds], ["--postcopy", *when])
    assert received["digest"] == sent["digest"]
    # Fewer live rounds where nothing is written.
    finals = [each["final"] for each in sent["rounds"]]
    assert finals == [False] * (len(finals) - 1) + [True]
    assert len(finals) in (range(2, rounds + 2) if rounds else [1])
    assert 0 < received["ran_after"] <= received["complete_after"]


@pytest.mark.parametrize("rounds", [0, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.usefixtures("guards")
def test_snapshots_and_checkpoints_go_with_their_arrays(migrated, tmp_path, channels, rounds):
    arrays = {"w": np.random.default_rng(3).random((300, 70)), "b": np.arange(30)}
    snapshot.save(tmp_path / "snapshot", arrays, state={"step": 1})
    with Checkpoint(tmp_path / "checkpoint", arrays, sync=False) as checkpoint:
        checkpoint.save(step=4)
    for origin in ("snapshot", "checkpoint"):
        words = [f"--{origin}", tmp_path / origin, "--postcopy", rounds, "--channels", channels]
        received, sent = migrated(words, ["--postcopy"])
        assert received["digest"] == sent["digest"]
        assert received["arrays"] == ["w", "b"]


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("when", [[], ["--run", "filled"]])
def test_it_goes_over_tls(migrated, tmp_path, when):
    keys = Path(__file__).parents[1] / "sinks" / "certificates"
    snapshot.save(tmp_path / "here", np.random.default_rng(3).integers(0, 256, 300 * PAGE, np.uint8))
    ends = [["--tls-cert", keys / f"{end}.pem", "--tls-ca", keys / "authority.pem"] for end in ("sender", "receiver")]
    words = ["--snapshot", tmp_path / "here", "--postcopy", 0, "--channels", 2]
    received, sent = migrated([*words, *ends[0]], ["--postcopy", *when, *ends[1]])
    assert received["digest"] == sent["digest"]
    assert 0 < received["ran_after"] <= received["complete_after"]


@pytest.mark.usefixtures("guards")
def test_a_receiver_takes_memory_without_it_as_well(migrated, tmp_path):
    snapshot.save(tmp_path / "here", np.ones(3 * PAGE, np.uint8))
    received, sent = migrated(["--snapshot", tmp_path / "here"], ["--postcopy"])
    assert received["digest"] == sent["digest"]


def test_a_journal_names_a_copy_that_waits_to_be_filled(tmp_path, capsys):
    session = "0" * 32
    record = {"session": session, "end": "copy", "stage": "fills"}
    (tmp_path / f"{session}.copy.json").write_text(json.dumps(record))
    assert run(migrate, "settle", "127.0.0.1:1", session, "--journal", tmp_path) == 0
    assert "nothing ran here, and the source may go on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("send HERE --pid 4711 --postcopy 1", r"of --pid 4711 memory goes without registers.*leave --postcopy out"),
        ("send HERE --demo --postcopy 1 --force", r"--force is about rounds.*leave it out"),
        ("receive --postcopy --out there", r"--out there is complete and on the disk.*leave --postcopy out at both"),
        ("receive --postcopy --snapshot x", r"--snapshot x is complete and on the disk.*receive into memory"),
        ("receive --postcopy --run filled --checkpoint x", r"--checkpoint x is complete and on the disk"),
        ("receive --run filled", r"--run filled is about --postcopy; leave it out, or add --postcopy"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_anything_is_opened(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Misunderstood, match=message):
        run(migrate, *words.replace("HERE", "127.0.0.1:1").split())
    assert not list(tmp_path.iterdir())


def test_a_number_of_rounds_is_held_to_its_bound(capsys):
    with pytest.raises(SystemExit):
        run(migrate, "send", "127.0.0.1:1", "--demo", "--postcopy", "-1")
    assert "argument --postcopy: " in capsys.readouterr().err


def test_pages_smaller_than_the_systems_are_refused_before_anybody_is_connected_to(tmp_path):
    snapshot.save(tmp_path / "here", np.ones(3 * PAGE, np.uint8), page_size=512)
    with pytest.raises(DirtyLogError, match=r"have 512 bytes, and --postcopy takes the system's.*leave"):
        run(migrate, "send", "127.0.0.1:1", "--snapshot", tmp_path / "here", "--postcopy", "0")


def test_a_receiver_that_is_not_asked_to_refuses_it_with_the_option_that_lets_it(migrated, tmp_path):
    snapshot.save(tmp_path / "here", np.ones(3 * PAGE, np.uint8))
    with pytest.raises(DirtyLogError, match=r"pass postcopy=True \(--postcopy\)"):
        migrated(["--snapshot", tmp_path / "here", "--postcopy", "0"], [])


def test_people_are_told_which_round_the_copy_ran_in(capsys):
    last = Round(1, True, 3, 0, 3 * PAGE, 3 * PAGE, 0.1, 1e6)
    migrate.show_rounds([last], True)
    assert "1 (postcopy)" in capsys.readouterr().out
    migrate.show_rounds([last])
    assert "1 (paused)" in capsys.readouterr().out
