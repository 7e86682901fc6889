"""What needs no Python, in C: the geometry of a harvest, the vector paths, and deltas of live memory."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(compiler, program, tmp_path, *sources):
    """Compile a C file that is beside this one, and return how it ended and what it printed."""
    if not (ROOT / "dirtylog" / "_bits" / "harvest.h").exists():
        pytest.skip("no source tree")
    files = [Path(__file__).with_name(f"{program}.c"), *(ROOT / "dirtylog" / "_bits" / name for name in sources)]
    include = [f"-I{ROOT / 'dirtylog' / 'include'}", f"-I{ROOT / 'dirtylog'}"]
    flags = ["-std=gnu11", "-O1", "-pthread", "-Wall", "-Werror", "-Wno-unused-function"]
    subprocess.run([compiler, *flags, *include, *files, "-o", tmp_path / program], check=True)
    answer = subprocess.run([tmp_path / program], capture_output=True, text=True)
    return answer.returncode, answer.stdout


def test_a_range_is_made_of_lines_and_of_the_pages_left_and_right_of_them(c_compiler, tmp_path):
    assert run(c_compiler, "harvest_parts", tmp_path) == (0, "")


def test_every_vector_path_does_what_the_scalar_one_does(c_compiler, tmp_path):
    assert run(c_compiler, "kernels", tmp_path, "simd.c") == (0, "")


def test_a_harvest_to_page_numbers_leaves_dirty_what_finds_no_room(c_compiler, tmp_path):
    assert run(c_compiler, "harvest_pages", tmp_path, "simd.c") == (0, "")


def test_a_delta_of_memory_that_is_written_meanwhile_is_one_that_the_other_end_takes(c_compiler, tmp_path):
    assert run(c_compiler, "live_delta", tmp_path) == (0, "")
