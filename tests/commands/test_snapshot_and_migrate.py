"""``dirtylog snapshot`` and ``dirtylog migrate``: what they print, write and answer."""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dirtylog import BackendUnavailable, DirtyLogError, track
from dirtylog.commands import migrate, snapshot


def run(command, *words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def images(tmp_path):
    first = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8)
    second = first.copy()
    second[[10, 100_000, 299_999]] ^= 1
    first.tofile(tmp_path / "first")
    second.tofile(tmp_path / "second")
    return tmp_path


def test_images_are_saved_diffed_restored_rebased_and_verified(images, capsys):
    def answer(*words):
        assert run(snapshot, *words, "--json") == 0
        return json.loads(capsys.readouterr().out)

    base, diff = images / "base", images / "diff"
    assert answer("save", base, images / "first", "--epoch", 3)["epoch"] == 3
    assert answer("diff", diff, images / "second", "--parent", base, "--no-sync")["count"] == 3
    answer("restore", diff, images / "restored")
    assert (images / "restored").read_bytes() == (images / "second").read_bytes()
    assert answer("verify", diff)["kind"] == "diff"
    assert answer("rebase", base, diff)["kind"] == "full"
    assert answer("info", base)["npages"] == 74
    answer("restore", base, images / "again")
    assert (images / "again").read_bytes() == (images / "second").read_bytes()


def test_a_diff_takes_the_pages_of_a_bitmap(images, capsys):
    run(snapshot, "save", images / "base", images / "first")
    (images / "bitmap").write_bytes(np.array([0b11, 1], "<u8").tobytes())
    run(snapshot, "diff", images / "d", images / "second", "--parent", images / "base", "--bitmap", images / "bitmap")
    assert "3 pages" in capsys.readouterr().out


def test_what_fails_is_one_error_and_leaves_nothing(images):
    run(snapshot, "save", images / "base", images / "first")
    names = sorted(os.listdir(images))
    (images / "empty").touch()
    with pytest.raises(DirtyLogError, match="will not do"):
        run(snapshot, "save", images / ".x", images / "first")
    with pytest.raises(DirtyLogError, match="empty"):
        run(snapshot, "save", images / "x", images / "empty")
    with pytest.raises(DirtyLogError, match="no such snapshot"):
        run(snapshot, "info", images / "x")
    with pytest.raises(FileExistsError, match="give another name"):
        run(snapshot, "restore", images / "base", images / "first")
    (images / "short").write_bytes(b"1000")
    with pytest.raises(DirtyLogError, match=r"short has 4 bytes, its parent .*base 300000: .* save a full snapshot"):
        run(snapshot, "diff", images / "x", images / "short", "--parent", images / "base")
    words = ("--parent", images / "base", "--bitmap", images / "short")
    with pytest.raises(DirtyLogError, match=r"short: data has 4 bytes"):
        run(snapshot, "diff", images / "x", images / "second", *words)
    os.unlink(images / "short")
    with open(images / "base", "r+b") as file:
        file.write(b"\0" * 10)
    with pytest.raises(DirtyLogError, match="does not match its digest"):
        run(snapshot, "restore", images / "base", images / "x")
    os.unlink(images / "empty")
    assert sorted(os.listdir(images)) == names


@pytest.mark.parametrize("address", ["localhost", ":4000", "127.0.0.1:99999", "127.0.0.1:x", "unix:"])
def test_what_is_no_address_is_refused(address, capsys):
    with pytest.raises(SystemExit) as caught:
        run(migrate, "send", "--demo", address)
    assert caught.value.code == 2
    assert "argument HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["receive --listen 0.0.0.0:0", "send 192.0.2.1:80 --demo --size 1"])
def test_an_address_that_others_reach_is_refused_without_tls(words):
    try:
        with pytest.raises(DirtyLogError, match=r"not a loopback address, and there is no TLS: .*--insecure"):
            run(migrate, *words.split())
    except BackendUnavailable as error:
        pytest.skip(str(error))


def test_keys_are_read_before_anybody_is_let_in(tmp_path):
    (tmp_path / "token").write_bytes(b"short")
    (tmp_path / "token").chmod(0o600)
    with pytest.raises(DirtyLogError, match=r"has 5 bytes; it must have 16 to 1024: .*--token-file"):
        run(migrate, "receive", "--token-file", tmp_path / "token")
    with pytest.raises(DirtyLogError, match="TLS needs cert and ca at both ends"):
        run(migrate, "receive", "--tls-cert", tmp_path / "token")


@pytest.mark.parametrize(
    "words",
    ["--size 0", "--writers -1", "--batch 0", "--downtime nan", "--max-rounds 0", "--timeout 0", "--timeout inf"],
)
def test_a_number_out_of_its_bounds_is_refused_by_name(words, capsys):
    with pytest.raises(SystemExit) as caught:
        run(migrate, "send", "127.0.0.1:1", "--demo", *words.split())
    assert caught.value.code == 2
    assert f"argument {words.split()[0]}: " in capsys.readouterr().err


def test_a_migration_that_nobody_listens_to_names_the_address_and_the_way_out():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    try:
        with pytest.raises(ConnectionRefusedError, match=rf"{address}: .*; start 'dirtylog migrate receive' first"):
            run(migrate, "send", address, "--demo", "--size", "1")
    except BackendUnavailable as error:
        pytest.skip(str(error))


def test_a_receiver_that_nobody_comes_to_names_its_address_and_how_long_it_waited():
    with pytest.raises(TimeoutError, match=r"nobody came to 127.0.0.1:\d+ within 0.001 s: .*; raise --timeout"):
        run(migrate, "receive", "--timeout", "0.001")


END = """
import argparse, sys
from dirtylog.commands import migrate
parser = argparse.ArgumentParser()
migrate.add_arguments(parser)
sys.exit(migrate.run(parser.parse_args(sys.argv[1:])))
"""


def test_a_writing_process_migrates_into_another_one(tmp_path):
    try:
        track(np.zeros(1 << 16, np.uint8)).close()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

    def end(*words):
        return subprocess.Popen(
            [sys.executable, "-c", END, *words, "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    keys = Path(__file__).parents[1] / "sinks" / "certificates"
    (tmp_path / "token").write_bytes(b"0123456789abcdef")
    (tmp_path / "token").chmod(0o600)
    tls = ["--tls-ca", str(keys / "authority.pem"), "--token-file", str(tmp_path / "token"), "--tls-cert"]
    with end("receive", *tls, str(keys / "receiver.pem"), "--out", str(tmp_path / "memory")) as receiver:
        address = receiver.stderr.readline().removeprefix("listening on ").strip()
        words = ["--demo", "--size", "8", "--max-rounds", "3", "--force", "--bandwidth", "500", "--reconnect", "2"]
        with end("send", address, *tls, str(keys / "sender.pem"), *words, "--journal", str(tmp_path)) as sender:
            sent, complaint = sender.communicate(timeout=100)
            assert sender.returncode == 0, complaint
        received, complaint = receiver.communicate(timeout=100)
        assert receiver.returncode == 0, complaint
    assert json.loads(sent)["digest"] == json.loads(received)["digest"]
    assert json.loads(sent)["rounds"][-1]["final"]
    assert (tmp_path / "memory").stat().st_size == 8 << 20
    assert json.loads((tmp_path / f"{json.loads(sent)['session']}.source.json").read_text())["stage"] == "done"


def test_a_directory_is_listed_pruned_merged_and_cleaned(images, capsys):
    def answer(*words):
        assert run(snapshot, *words, "--json") == 0
        return json.loads(capsys.readouterr().out)

    answer("save", images / "a", images / "first", "--no-sync")
    for parent, name, image in (("a", "b", "second"), ("b", "c", "first"), ("c", "d", "second"), ("b", "x", "first")):
        answer("diff", images / name, images / image, "--parent", images / parent, "--no-sync")
    listed = answer("list", images)["snapshots"]
    assert [os.path.basename(each["path"]) for each in listed] == ["a", "b", "c", "d", "x"]
    assert [each["depth"] for each in listed] == [0, 1, 2, 3, 2]
    (images / "e").write_bytes((images / "d").read_bytes()[:-5])
    assert run(snapshot, "tree", images) == 0
    tree = capsys.readouterr().out
    assert "  x" in tree
    assert "restorable" in tree
    os.unlink(images / "e")
    assert answer("merge", images / "c", images / "d", "--no-sync")["parent"] == "b"
    assert answer("flatten", images / "x", "--no-sync")["kind"] == "full"
    assert len(answer("prune", images, "--keep-last", 1, "--dry-run")["removed"]) == 3
    assert run(snapshot, "prune", images, "--keep-last", 1, "--no-sync") == 0
    assert capsys.readouterr().out.count("removed") == 3
    assert [os.path.basename(each["path"]) for each in answer("list", images)["snapshots"]] == ["x"]
    assert answer("clean", images, "--dry-run")["removed"] == []
    with pytest.raises(DirtyLogError, match=r"nothing would be kept: .* \(--keep-last N, --keep-daily N\)"):
        run(snapshot, "prune", images)


def test_a_journal_says_who_may_run(tmp_path, capsys):
    session = "0" * 32
    record = {"session": session, "end": "source", "stage": "given"}
    (tmp_path / f"{session}.source.json").write_text(json.dumps(record))
    assert run(migrate, "status", session, "--journal", tmp_path) == 0
    assert "source: given: the right to run was given away and no answer came" in capsys.readouterr().out
    run(migrate, "status", session, "--journal", tmp_path, "--json")
    assert json.loads(capsys.readouterr().out)["may_run"] is None
    with pytest.raises(DirtyLogError, match="knows nothing of session"):
        run(migrate, "status", "1" * 32, "--journal", tmp_path)
    with pytest.raises(DirtyLogError, match="must be 32 hexadecimal digits"):
        run(migrate, "settle", "127.0.0.1:1", "x", "--journal", tmp_path)
    with pytest.raises(ConnectionRefusedError, match="start 'dirtylog migrate receive' first"):
        run(migrate, "settle", "127.0.0.1:1", session, "--journal", tmp_path)
    (tmp_path / f"{session}.source.json").write_text(json.dumps({**record, "stage": "done"}))
    assert run(migrate, "settle", "127.0.0.1:1", session, "--journal", tmp_path) == 0
    assert "the copy has taken the right to run" in capsys.readouterr().out
