"""The geometry of a harvest, in C and without Python."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_range_is_made_of_lines_and_of_the_pages_left_and_right_of_them(tmp_path):
    if not (compiler := shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler")
    if not (ROOT / "dirtylog" / "_bits" / "harvest.h").exists():
        pytest.skip("no source tree")
    program = tmp_path / "harvest_parts"
    source = Path(__file__).with_name("harvest_parts.c")
    include = [f"-I{ROOT / 'dirtylog' / 'include'}", f"-I{ROOT / 'dirtylog'}"]
    subprocess.run(
        [compiler, "-std=gnu11", "-O1", "-Wall", "-Werror", "-Wno-unused-function", *include, source, "-o", program],
        check=True,
    )
    answer = subprocess.run([program], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, "")
