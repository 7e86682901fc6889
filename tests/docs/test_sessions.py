"""The pages about snapshots and checkpoints do what they show: what they type in a terminal, and their programs."""

import os
import re
import shlex
import subprocess

import numpy as np
import pytest

import dirtylog as dl
from dirtylog import cli

from .test_pages import ROOT, run_program

PAGE = 4096


def images(directory):
    """Three days of a memory of 256 pages."""
    memory = np.zeros(256 * PAGE, np.uint8)
    for day, pages in (("monday", range(40)), ("tuesday", (3, 50)), ("wednesday", (4, 5, 60))):
        memory.reshape(256, PAGE)[list(pages)] += 1
        memory.tofile(directory / f"{day}.raw")


def run_ckpt(directory):
    """Three checkpoints of two arrays."""
    weights, bias = dl.zeros((1000, 1000)), dl.zeros(1000)
    weights += 1
    bias += 1
    with dl.Checkpoint(directory / "run.ckpt", {"weights": weights, "bias": bias}) as checkpoint:
        checkpoint.save(step=100)
        for step, pages in ((200, 20), (300, 18)):
            weights.reshape(-1)[: pages * 512 * 50 : 512 * 50] += 1
            bias[0] += 1
            checkpoint.save(step=step, state={"loss": 50 / step})


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def bare(text):
    """What a session says wherever and whenever it is run: without directories, times, digests, sizes on a disk."""
    for pattern, name in (
        (r"(?<!\S)/(?:[\w.-]+/)*(?=[\w.-]+)", ""),
        (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME"),
        (r"\b[0-9a-f]{32}\b", "DIGEST"),
        (r"[\d.]+ [KM]iB(?= on disk| *│ +(?:restorable|\d{10}\.ckpt))", "SIZE"),
        ("[│╭╮╰╯├┤┬┴┼─]", " "),
        (" +", " "),
    ):
        text = re.sub(pattern, name, text)
    return [line.strip() for line in text.splitlines() if line.strip()]


def commands(session):
    """Each line that is typed, and what it is said to answer."""
    parts = re.split(r"^\$ (.*)\n", session, flags=re.MULTILINE)
    return zip(parts[1::2], parts[2::2], strict=True)


@pytest.mark.parametrize(
    ("page", "prepare", "place", "left_out"),
    # The memory of a redis-server is what it is.
    [("snapshot", images, "images", "--pid"), ("checkpoint", run_ckpt, "me", None)],
    ids=["snapshot", "checkpoint"],
)
def test_a_session_of_a_page_goes_as_the_page_says(page, prepare, place, left_out, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich", reason="rich (extra: cli) is not installed")
    pytest.importorskip("xxhash", reason="xxhash (extra: snapshot) is not installed")
    directory = tmp_path / place
    directory.mkdir()
    monkeypatch.chdir(directory)
    prepare(directory)
    ran = 0
    for number, session in enumerate(blocks(ROOT / "docs" / "reference" / "commands" / f"{page}.md", "console")):
        if left_out is not None and left_out in session:
            continue
        if number and page == "snapshot":
            assert cli.main(shlex.split("snapshot diff wednesday.img wednesday.raw --parent tuesday.img")) == 0
            capsys.readouterr()
        for line, expected in commands(session):
            words = shlex.split(line)
            if words[0] == "dirtylog":
                assert cli.main(words[1:]) == 0, capsys.readouterr().err
                answer = capsys.readouterr().out
            else:
                answer = subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout
            assert bare(answer) == bare(expected), line
            ran += 1
    assert ran


# What the pages leave to the reader: arrays, a training, a guest.
PREPARED = {
    "let-a-child-save": """
        import dirtylog as dl
        w, b = dl.zeros(3000), dl.zeros(10)
        array = dl.zeros(40_000, dtype="u1")
        tracker = dl.track(array)
        array[5000] = 1
        def training():
            yield from range(3)
        def update(w, b):
            w[7] += 1
            b[0] += 1
        """,
    "open-a-snapshot": """
        import numpy as np, sys
        from dirtylog.sinks import snapshot
        from dirtylog.sources import kvm
        snapshot.save("booted", np.ones(64 * 4096, np.uint8))
        cases = range(2)
        def run(vcpu, case):
            mapped.array[case] = 7
        """,
}


@pytest.mark.parametrize("page", PREPARED)
def test_the_programs_of_a_page_run(page, tmp_path):
    if page == "open-a-snapshot" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm is not there, or not for this user")
    programs = blocks(ROOT / "docs" / "howto" / f"{page}.md", "python")
    assert programs
    prepared = "\n".join(line.removeprefix(" " * 8) for line in PREPARED[page].splitlines())
    path = tmp_path / "program.py"
    path.write_text("\n".join([prepared, *programs]))
    done = run_program(path, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
