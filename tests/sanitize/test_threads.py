"""ThreadSanitizer finds no race in the bitmap header, and finds the one that is built in on purpose."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from dirtylog import _core

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("bitmap_threads.c")
ENVIRONMENT = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66", "LD_PRELOAD": ""}
# gcc says that it does not model fences. None is needed for what is claimed here: in the owned pages
# every edge is a read-modify-write or a release store; the fences are the store-buffer model's matter.
FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Wno-tsan", "-Wno-unknown-warning-option", "-pthread"]


INCLUDES = [f"-I{ROOT}/dirtylog", f"-I{ROOT}/dirtylog/include"]


def build(directory, compiler, *options):
    program = directory / f"threads-{compiler}"
    command = [compiler, *FLAGS, *INCLUDES, *options, str(SOURCE)]
    return program, subprocess.run([*command, "-o", program], capture_output=True, text=True, check=False)


# ThreadSanitizer tells a race from the order of two accesses, whichever comes first: it needs no luck, and few rounds
# take long. A count needs some.
WATCHED, COUNTED = "5000", "30000"


def run(program, rounds, *arguments):
    return subprocess.run([program, rounds, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False)


def losses(output):
    return re.findall(r"^(\w+) pages: .* (\d+) lost$", output, re.MULTILINE)


@pytest.fixture(scope="module", params=["gcc", "clang"])
def compiler(request, tmp_path_factory):
    """A compiler whose ThreadSanitizer starts here."""
    tmp_path = tmp_path_factory.mktemp("probe")
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    try:
        built = subprocess.run(
            [request.param, "-fsanitize=thread", probe, "-o", tmp_path / "probe"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip(f"{request.param} is not installed")
    if built.returncode:
        pytest.skip(f"{request.param} -fsanitize=thread does not link: {built.stderr.strip()[-200:]}")
    ran = subprocess.run([tmp_path / "probe"], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    if ran.returncode:
        pytest.skip(f"ThreadSanitizer does not start on this kernel: {ran.stderr.strip()[-200:]}")
    return request.param


@pytest.mark.parametrize("levels", [["-DTWO_LEVELS"], []], ids=["two levels", "three levels"])
def test_marks_ranges_batches_and_harvests_race_with_nothing_and_lose_nothing(compiler, tmp_path, levels):
    program, built = build(tmp_path, compiler, "-fsanitize=thread", *levels)
    assert (built.returncode, built.stderr) == (0, "")
    done = run(program, WATCHED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(done.stdout) == [("owned", "0"), ("shared", "0")]


# ThreadSanitizer takes a vector load for a plain one, so it watches the scalar kernels; of the others the count tells.
@pytest.mark.parametrize(
    ("path", "rounds", "options"),
    [("scalar", WATCHED, ["-fsanitize=thread"]), ("avx2", COUNTED, []), ("avx512", COUNTED, [])],
)
def test_a_harvest_by_the_kernels_races_with_nothing_and_loses_nothing(compiler, tmp_path, path, rounds, options):
    if path not in _core.simd_paths():
        pytest.skip(f"this CPU cannot run {path}")
    program, built = build(tmp_path, compiler, *options, "-DKERNELS", str(ROOT / "dirtylog" / "_bits" / "simd.c"))
    assert built.returncode == 0, built.stderr
    done = run(program, rounds, path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(done.stdout) == [("owned", "0"), ("shared", "0")]


@pytest.mark.parametrize("broken", ["BROKEN_MARK", "BROKEN_HARVEST"])
def test_a_plain_operation_in_place_of_an_atomic_is_reported(compiler, tmp_path, broken):
    program, built = build(tmp_path, compiler, "-fsanitize=thread", f"-D{broken}")
    assert built.returncode == 0, built.stderr
    done = run(program, WATCHED)
    assert done.returncode == 66
    assert "data race" in done.stderr
