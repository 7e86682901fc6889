"""``dirtylog migrate receive --exec``: a program that is started with the memory when it may run."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dirtylog.commands import _terminal, migrate
from dirtylog.commands._refusal import Misunderstood
from dirtylog.sinks import snapshot

from .test_snapshot_and_migrate import run

PAGE = 4096
# Says what it finds, writes to it, and ends with a code of its own.
PROGRAM = """
import json, mmap, os, sys
memory, about, answer = sys.argv[1:]
with open(memory, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped, open(about) as text:
    committed = os.fstat(file.fileno()).st_blocks * 512
    found = json.load(text)
    parts = {name: bytes(mapped[each["offset"]:][:16]).hex() for name, each in found["arrays"].items()}
    mapped[0] = 1
with open(answer, "w") as file:
    json.dump([found, committed, parts], file)
sys.exit(7)
"""


def test_a_program_is_started_with_the_arrays_and_what_was_sent_beside_them(migrated, tmp_path):
    arrays = {"w": np.arange(1.0, 700.0).reshape(3, 233).T, "b": np.arange(1, 30, dtype=np.int16)}
    snapshot.save(tmp_path / "here", arrays, state={"step": 7, "registers": b"\0\xff"})
    words = [sys.executable, "-c", PROGRAM, "{memory}", "{about}", tmp_path / "answer"]
    received, _ = migrated(["--snapshot", tmp_path / "here"], ["--exec", *words])
    about, _, parts = json.loads((tmp_path / "answer").read_text())
    assert about["state"] == {"step": 7, "registers": {"$bytes": "AP8="}}
    assert {name: (each["dtype"], each["shape"], each["order"]) for name, each in about["arrays"].items()} == {
        "w": ("<f8", [233, 3], "F"),
        "b": ("<i2", [29], "C"),
    }
    assert parts == {name: each.tobytes("A")[:16].hex() for name, each in arrays.items()}
    # It writes by now: there is nothing to compare.
    assert received["digest"] is None
    assert "program" not in received


def test_zero_pages_are_never_committed_and_its_exit_code_is_the_commands(tmp_path, monkeypatch):
    memory = np.zeros(1024 * PAGE, np.uint8)
    memory[5 * PAGE] = 1
    snapshot.save(tmp_path / "here", memory)
    listening, codes = [], []
    come = threading.Event()
    monkeypatch.setattr(_terminal, "show_note", lambda text: (listening.append(text), come.set()))
    words = [sys.executable, "-c", PROGRAM, "{memory}", "{about}", tmp_path / "answer"]
    line = f"unix:{tmp_path / 'line'}"
    thread = threading.Thread(target=lambda: codes.append(run(migrate, "receive", "--listen", line, "--exec", *words)))
    thread.start()
    assert come.wait(60)
    assert run(migrate, "send", line, "--snapshot", tmp_path / "here") == 0
    thread.join()
    assert codes == [7]
    about, committed, _ = json.loads((tmp_path / "answer").read_text())
    assert (about["nbytes"], about["arrays"], about["state"]) == (memory.nbytes, {}, None)
    assert 0 < committed < 64 * PAGE


def test_its_words_may_be_any(migrated, tmp_path):
    """Also those that end an option's words, or look like one of this command's."""
    snapshot.save(tmp_path / "here", np.ones(PAGE, np.uint8))
    program = "import json, sys; json.dump(sys.argv[2:], open(sys.argv[1], 'w'))"
    words = ["-x", "--", "--json", "{memory}", "--", "--out"]
    migrated(["--snapshot", tmp_path / "here"], ["--exec", sys.executable, "-c", program, tmp_path / "words", *words])
    said = json.loads((tmp_path / "words").read_text())
    assert said[:3] == ["-x", "--", "--json"]
    assert said[3].startswith("/proc/self/fd/")
    assert said[4:] == ["--", "--out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stray", "stray: no option takes that; --exec starts a program, and comes last"),
        ("--exec ./vmm --fast", r"--exec \./vmm --fast: no word of it has {memory}.*--exec \./vmm --memory={memory}"),
        ("--exec", "no word of it has {memory}"),
        ("--exec /nonesuch {memory}", "--exec /nonesuch: there is no such program; give its path"),
        (
            "--postcopy --exec /bin/cat {memory}",
            "--exec shares the memory with a program.*leave --postcopy out at both",
        ),
    ],
)
def test_what_would_lose_the_memory_is_refused_before_anybody_comes(words, message, tmp_path):
    with pytest.raises(Misunderstood, match=message):
        run(migrate, "receive", "--listen", f"unix:{tmp_path / 'line'}", *words.split())
    assert not list(tmp_path.iterdir())


def test_where_the_program_cannot_be_executed_the_memory_stays_until_the_command_is_ended(tmp_path):
    memory = np.arange(64 * PAGE, dtype=np.uint16)
    snapshot.save(tmp_path / "here", memory)
    program = tmp_path / "program"
    program.write_bytes(bytes(8))
    program.chmod(0o755)
    line = f"unix:{tmp_path / 'line'}"
    words = ["migrate", "receive", "--listen", line, "--exec", program, "{memory}"]
    with subprocess.Popen([sys.executable, "-m", "dirtylog", *words], stderr=subprocess.PIPE, text=True) as receiver:
        try:
            assert receiver.stderr.readline().startswith("listening on ")
            # The copy has the right to run.
            assert run(migrate, "send", line, "--snapshot", tmp_path / "here") == 0
            note = receiver.stderr.readline()
            assert "program could not be started: Exec format error. Nobody else has the memory now." in note
            kept = Path(re.search(r"It is in (/proc/[0-9]+/fd/[0-9]+),", note)[1])
            assert (np.fromfile(kept, memory.dtype) == memory).all()
            assert receiver.poll() is None
        finally:
            # Not Ctrl-C: what a shell starts in the background ignores that.
            receiver.terminate()
