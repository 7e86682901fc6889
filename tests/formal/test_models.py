"""The models run, right orders hold, wrong ones are refuted with a story, and a wrong verdict fails the run."""

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def formal(monkeypatch):
    """The package beside the tests; it is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    from formal import __main__, catalog, spin

    if absent := spin.missing():
        pytest.skip(f"models need {' and '.join(absent)}, which the PATH does not have (Debian packages: spin, gcc)")
    # These few are small: to compile their verifiers takes longer than to run them.
    monkeypatch.setattr(spin, "LEVEL", "-O0")
    return dataclasses.make_dataclass("Formal", ["main", "catalog", "spin"])(__main__, catalog, spin)


def check(formal, name):
    (found,) = [check for check in formal.catalog.CHECKS if check.name == name]
    return found


def test_the_summary_level_holds_and_every_statement_of_it_is_reached(formal):
    result = formal.spin.run(check(formal, "summary/as built/loss"))
    assert (result.verdict, result.unreached, result.trail) == ("holds", (), ())
    assert result.states > 10_000


def test_a_wrong_order_is_refuted_and_the_trail_tells_how_the_write_is_lost(formal):
    result = formal.spin.run(check(formal, "summary/summary-before-leaf/loss"))
    assert result.as_expected
    assert result.verdict == "refuted"
    story = " | ".join(result.trail)
    assert story.index("marks the summary") < story.index("harvest takes the summary: 1")
    assert story.endswith(("stale pages: 1", "stale pages: 2"))


def test_a_clock_that_is_put_back_leaves_the_story_whole(formal, monkeypatch):
    """Spin warns of a model that is newer than its trail before it tells anything."""

    def copy_from_the_future(source, directory):
        later = time.time() + 3600
        os.utime(shutil.copyfile(source, directory / source.name), (later, later))

    monkeypatch.setattr(formal.spin.shutil, "copy", copy_from_the_future)
    result = formal.spin.run(check(formal, "summary/summary-before-leaf/loss"))
    assert result.trail[0] == "marker 1 stores into page 0"
    assert result.trail[-1].startswith("the last harvest is copied")


def test_a_test_without_a_fence_is_refuted_only_by_store_buffers(formal):
    fenced = formal.spin.run(check(formal, "store_buffer/batch, TSO/loss"))
    assert fenced.verdict == "holds"
    bare = formal.spin.run(check(formal, "store_buffer/test-without-fence/loss"))
    assert bare.verdict == "refuted"
    assert any("reaches memory" in line for line in bare.trail)


@pytest.mark.parametrize(
    ("name", "demanded"), [("summary/as built/loss", "refuted"), ("summary/partial-takes-line/loss", "holds")]
)
def test_a_verdict_that_is_not_the_one_demanded_fails_the_run(formal, monkeypatch, capsys, name, demanded):
    wrong = dataclasses.replace(check(formal, name), expect=demanded)
    monkeypatch.setattr(formal.main, "CHECKS", (wrong,))
    assert formal.main.main([]) == 1
    assert "1 not as demanded" in capsys.readouterr().out


def test_a_model_that_does_not_parse_gives_no_verdict_and_fails_the_run(formal, monkeypatch, capsys, tmp_path):
    (tmp_path / "summary.pml").write_text("proctype nonsense( {")
    monkeypatch.setattr(formal.spin, "MODELS", tmp_path)
    assert formal.main.main(["--only", "summary/as built/loss"]) == 1
    assert "NONE" in capsys.readouterr().out


def test_an_unknown_name_is_refused(formal, capsys):
    with pytest.raises(SystemExit):
        formal.main.main(["--only", "nonesuch"])
    assert "--list" in capsys.readouterr().err


def test_the_command_prints_json_and_exits_with_zero(formal, capsys):
    assert formal.main.main(["--json", "--only", "summary/*/prompt"]) == 0
    told = {record["variant"]: record["verdict"] for record in json.loads(capsys.readouterr().out)}
    assert told == {"as built": "holds", "skip-when-leaf-is-set": "refuted"}


def test_every_model_has_a_variant_that_holds_and_eight_or_more_are_refuted(formal):
    checks = formal.catalog.CHECKS
    assert {c.model for c in checks if c.expect == "holds"} == {p.stem for p in formal.spin.MODELS.glob("*.pml")} - {
        "machine",
        "bitmap_writers",
    }
    assert len({(c.model, c.variant) for c in checks if c.expect == "refuted"}) >= 8
    assert len({c.name for c in checks}) == len(checks)
