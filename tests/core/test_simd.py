"""The vector paths: which there are, how one is chosen; and comparing pages' contents."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog import _core


def import_with(path):
    return subprocess.run(
        [sys.executable, "-c", "from dirtylog import _core; print(_core.simd_path())"],
        env={**os.environ, "DIRTYLOG_SIMD": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_scalar_is_always_there_and_the_path_in_use_is_one_of_them():
    assert "scalar" in _core.simd_paths()
    assert _core.simd_path() in _core.simd_paths()
    assert set(_core.simd_paths()) <= {"scalar", "avx2", "avx512", "neon"}


@pytest.mark.parametrize("path", _core.simd_paths())
def test_each_path_can_be_forced(path):
    assert import_with(path).stdout.strip() == path


def test_a_path_that_cannot_run_is_refused_with_those_that_can():
    refused = import_with("altivec")
    assert refused.returncode != 0
    assert "altivec" in refused.stderr
    assert "scalar" in refused.stderr


def test_a_path_runs_where_linux_names_all_that_it_needs():
    # Under an emulator /proc/cpuinfo may be that of the machine below.
    if platform.machine() != "x86_64":
        pytest.skip(f"{platform.machine()} has no flags in /proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert found
    needed = {"scalar": set(), "avx2": {"cx16", "popcnt", "bmi1", "bmi2", "avx2", "abm"}}
    needed["avx512"] = needed["avx2"] | {f"avx512{name}" for name in ("f", "dq", "bw", "vl", "_vbmi2", "_vpopcntdq")}
    flags = set(found[1].split())
    assert set(_core.simd_paths()) == {path for path, names in needed.items() if names <= flags}
    assert set(_core.simd_missing()) == {path for path, names in needed.items() if not names <= flags}
    for path, what in _core.simd_missing().items():
        assert what in needed[path] - flags


def test_what_is_missing_is_said_where_the_path_is_refused():
    for path, what in _core.simd_missing().items():
        refused = import_with(path)
        assert refused.returncode != 0
        assert f"{path} needs {what}" in refused.stderr
    assert not set(_core.simd_missing()) & set(_core.simd_paths())


def test_the_best_path_is_taken_when_none_is_forced():
    assert import_with("").stdout.strip() == _core.simd_paths()[0]


sizes = st.one_of(st.integers(0, 9000), st.sampled_from([4095, 4096, 4097, 3 * 4096, 64 * 512, 65 * 512]))


@given(size=sizes, page_size=st.sampled_from([512, 4096]), data=st.data())
def test_pages_that_differ_in_one_byte_are_found(size, page_size, data):
    one = np.arange(size, dtype=np.uint32).astype(np.uint8)
    other = one.copy()
    changed = data.draw(st.sets(st.integers(0, size - 1), max_size=5)) if size else set()
    other[sorted(changed)] ^= 0x80
    dirty = _core.compare_pages(one, other, page_size)
    assert set(dirty) == {at // page_size for at in changed}
    assert (dirty.npages, dirty.page_size) == (-(-size // page_size), page_size)


@pytest.mark.parametrize("at", [*range(130), 511, 512, 4094, 4095])
def test_one_byte_anywhere_in_a_page_is_seen(at):
    one, other = np.zeros(8192, np.uint8), np.zeros(8192, np.uint8)
    other[4096 + at] = 1
    assert list(_core.compare_pages(one, other, 4096)) == [1]
    assert list(_core.zero_pages(other, 4096)) == [0]


def test_buffers_of_different_length_do_not_compare():
    with pytest.raises(ValueError, match="8192"):
        _core.compare_pages(bytes(4096), bytes(8192), 4096)
