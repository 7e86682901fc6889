"""Extensions of other packages, in C and in Cython, built against the installed dirtylog."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl

HERE = Path(__file__).parent

pytestmark = pytest.mark.usefixtures("c_compiler")

SETUP = """
import os
from setuptools import Extension, setup
from Cython.Build import cythonize
import dirtylog
beside = os.path.dirname(os.path.dirname(dirtylog.__file__))
setup(
    name="downstream",
    ext_modules=cythonize(
        [Extension("downstream_cython", ["downstream_cython.pyx"], include_dirs=[dirtylog.get_include()])],
        include_path=[beside],
    ) + [Extension("downstream_c", ["downstream_c.c"], include_dirs=[dirtylog.get_include()])],
)
"""

# As an editable installation does it: the package is imported, and is in no directory of sys.path.
EDITABLE = """
import importlib.util
import sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "dirtylog":
            where = {0!r}
            return importlib.util.spec_from_file_location(
                name, where + "/__init__.py", submodule_search_locations=[where]
            )

sys.meta_path.append(Finder)
"""


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def downstream(tmp_path_factory):
    """Build both extensions as a package of somebody else's would."""
    pytest.importorskip("Cython", reason="Cython is not installed: no downstream Cython extension can be built")
    directory = tmp_path_factory.mktemp("downstream")
    for name in ("downstream_c.c", "downstream_cython.pyx"):
        shutil.copy(HERE / name, directory)
    (directory / "setup.py").write_text(SETUP)
    (directory / "sitecustomize.py").write_text(EDITABLE.format(str(Path(dl.__file__).parent)))
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory), "CFLAGS": "-O0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return {name: load(name, directory / f"{name}{suffix}") for name in ("downstream_c", "downstream_cython")}


@pytest.mark.parametrize("name", ["downstream_c", "downstream_cython"])
def test_an_extension_marks_pages_and_is_refused_past_the_end(downstream, name):
    bitmap = dl.DirtyBitmap(1000)
    assert downstream[name].mark_many(bitmap, 990, 15) == 5
    assert bitmap.harvest().runs().tolist() == [[990, 10]]


@pytest.mark.parametrize("name", ["downstream_c", "downstream_cython"])
def test_an_extension_is_told_when_it_passes_something_else(downstream, name):
    with pytest.raises(TypeError, match="DirtyBitmap is needed, not ndarray"):
        downstream[name].mark_many(np.zeros(4, np.uint64), 0, 1)


def test_the_table_keeps_the_places_that_extensions_were_built_with():
    header = Path(dl.get_include(), "dirtylog", "capi.h").read_text()
    table = header[header.index("struct dirtylog_api {") : header.index("};")]
    assert re.findall(r"\(\*(\w+)\)\(", table) == [
        *("bitmap", "npages", "mark", "mark_range", "mark_pages", "is_dirty", "harvest", "harvest_quiescent"),
        *("count", "harvest_pages"),
    ]


def test_every_function_of_the_table_answers_as_the_header_says(downstream):
    bitmap = dl.DirtyBitmap(1000)
    out = np.full(16, 7, np.uint64)
    answers = (1000, 0, -1, 0, -1, 1, 0, -1, 4, 940, 4, 3, 1, 65)
    assert downstream["downstream_c"].everything(bitmap, out) == answers
    assert dl.runs(out).tolist() == [[60, 940]]
    assert bitmap.count() == 0


@pytest.mark.parametrize("quiescent", [False, True])
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("npages", [1, 63, 513, 70_001, 32 * 512 * 64, 33 * 512 * 64 + 5 * 64 + 7])
@pytest.mark.parametrize("density", [0, 0.001, 0.1, 1])
def test_an_extension_harvests_what_python_marked(downstream, foreign, npages, density, quiescent):
    words = np.zeros((npages + 63) // 64, np.uint64)
    bitmap = dl.DirtyBitmap.from_buffer(words, npages) if foreign else dl.DirtyBitmap(npages)
    pages = np.unique(np.random.default_rng(5).integers(0, npages, int(npages * density)))
    pages = np.arange(npages) if density == 1 else pages
    bitmap.mark_pages(pages)
    if foreign and npages % 64:
        words[-1] |= np.uint64(1 << 63)  # not ours: it stays (I7)
    out = np.full(words.size + 8, 7, np.uint64)  # what lies behind it is not touched
    assert downstream["downstream_cython"].harvest(bitmap, out[:-8], quiescent) == pages.size
    assert np.array_equal(dl.indices(out[:-8]), pages)
    assert (out[-8:] == 7).all()
    assert not bitmap.peek()
    assert not foreign or dl.popcount(words) == (npages % 64 != 0)


def test_an_extension_gets_every_word_where_groups_of_lines_between_the_dirty_ones_are_clean(downstream):
    bitmap = dl.DirtyBitmap(40 * 512 * 64)
    pages = [3 * 512 * 64 + 5, 20 * 512 * 64, 38 * 512 * 64 + 100]
    bitmap.mark_pages(pages)
    out = np.full(40 * 512, 7, np.uint64)
    assert downstream["downstream_cython"].harvest(bitmap, out, False) == 3
    assert dl.indices(out).tolist() == pages


def numbers(extension, bitmap, room):
    """Harvest page numbers, `room` at a time, until fewer come."""
    out, found = np.full(room + 1, -7), []
    while True:
        before = bitmap.count()
        count = extension.harvest_pages(bitmap, out, room)
        assert out[room] == -7
        found.append(out[:count].copy())
        assert extension.count(bitmap) == bitmap.count() == before - count
        if count < room:
            return np.concatenate(found)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("npages", [1, 63, 513, 70_001, 33 * 512 * 64 + 5 * 64 + 7, (1 << 26) + 5])
@pytest.mark.parametrize("density", [0, 0.001, 0.1, 1])
def test_an_extension_harvests_page_numbers_and_what_finds_no_room_stays_dirty(downstream, foreign, npages, density):
    words = np.zeros((npages + 63) // 64, np.uint64)
    bitmap = dl.DirtyBitmap.from_buffer(words, npages) if foreign else dl.DirtyBitmap(npages)
    last = min(npages, 200_000)  # of a large bitmap, the end
    pages = np.unique(np.random.default_rng(5).integers(npages - last, npages, int(last * density)))
    pages = np.arange(npages - last, npages) if density == 1 else pages
    for room in {1, 64, pages.size, pages.size + 1, pages.size // 3, 40_000} - {0}:
        if pages.size > 300 * room:
            continue
        bitmap.mark_pages(pages)
        assert np.array_equal(numbers(downstream["downstream_cython"], bitmap, room), pages)
        assert bitmap.count() == 0
        assert not bitmap.harvest()


def markers(downstream, bitmap):
    """Two threads, not started yet: each extension marks one half of the bitmap."""
    half = bitmap.npages // 2
    modules = [downstream["downstream_c"], downstream["downstream_cython"]]
    return [
        threading.Thread(target=module.mark_many, args=(bitmap, place * half, half))
        for place, module in enumerate(modules)
    ]


def test_extensions_mark_from_two_threads_while_a_third_harvests_page_numbers_and_none_is_lost(downstream):
    npages = 1 << 20
    bitmap = dl.DirtyBitmap(npages)
    threads = markers(downstream, bitmap)
    seen, out = np.zeros(npages, np.int64), np.zeros(1000, np.int64)
    harvest = downstream["downstream_cython"].harvest_pages
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for room in (1, 63, 1000):
            seen[out[: harvest(bitmap, out, room)]] += 1
    for thread in threads:
        thread.join()
    while found := harvest(bitmap, out, out.size):
        seen[out[:found]] += 1
    assert np.array_equal(seen, np.ones(npages, np.int64))


def test_extensions_mark_from_two_threads_while_python_harvests_and_none_is_lost(downstream):
    npages = 1 << 20
    bitmap = dl.DirtyBitmap(npages)
    threads = markers(downstream, bitmap)
    seen = np.zeros(npages, np.int64)
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen[bitmap.harvest().indices()] += 1
    for thread in threads:
        thread.join()
    seen[bitmap.harvest().indices()] += 1
    assert np.array_equal(seen, np.ones(npages, np.int64))
