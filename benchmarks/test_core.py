"""Every operation by pytest-benchmark: ``python -m pytest benchmarks --benchmark-only``."""

import pytest

from benchmarks.works import DENSITIES, OPERATIONS, SIZES, contestants

SLOW_PAGES = 1 << 18  # more dirty pages than these take the reference seconds a round


@pytest.fixture(scope="module")
def works():
    kept = {}

    def get(*key):
        if key not in kept:
            kept.clear()  # one set-up at a time: they are large
            kept[key] = contestants(*key)
        return kept[key]

    return get


@pytest.mark.parametrize("name", ["dirtylog", "numpy", "reference"])
@pytest.mark.parametrize("density", DENSITIES, ids="{:.2%}".format)
@pytest.mark.parametrize("npages", SIZES, ids=["2^18", "2^24"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(benchmark, works, operation, npages, density, name):
    benchmark.group = f"{operation}, {npages:,} pages, {density:.2%}"
    prepare, work = works(operation, npages, density)[name]
    slow = name != "dirtylog" and npages * density > SLOW_PAGES

    def setup():
        prepare()  # what it returns would be taken for the work's arguments

    benchmark.pedantic(work, setup=setup, rounds=1 if slow else 10)
