"""probe(): each facility by using it, with the call that refused."""

import mmap

import pytest

import dirtylog as dl
from dirtylog.sources.memory import _tracking
from dirtylog.sources.memory import probe as module
from dirtylog.sources.memory.probe import Facility, Mapping, mappings_of, probe

PAGE = mmap.PAGESIZE


def by_name():
    return {facility.name: facility for facility in probe()}


def test_every_facility_says_why_not_where_it_is_missing():
    found = by_name()
    assert list(found) == ["userfaultfd", "userfaultfd WP_ASYNC", "PAGEMAP_SCAN", "soft-dirty", "mprotect"]
    for facility in found.values():
        assert facility.available is (facility.detail == "")


def test_what_the_probe_promises_track_delivers():
    found = by_name()
    array = dl.zeros(PAGE, "u1")
    for name, backend in (("PAGEMAP_SCAN", "userfaultfd"), ("mprotect", "mprotect")):
        if found[name].available:
            dl.track(array, backend).close()
        else:
            with pytest.raises(dl.BackendUnavailable):
                dl.track(array, backend)


@pytest.mark.parametrize(
    ("refusal", "available"),
    [
        ("userfaultfd(UFFD_USER_MODE_ONLY): Operation not permitted", (False, False, False)),
        ("ioctl(UFFDIO_API) with WP_UNPOPULATED and WP_ASYNC: Invalid argument", (True, False, False)),
        ("ioctl(PAGEMAP_SCAN): Inappropriate ioctl for device", (True, True, False)),
        ("", (True, True, True)),
    ],
)
def test_a_refusal_is_laid_at_the_right_facility(monkeypatch, refusal, available):
    monkeypatch.setattr(_tracking, "probe", lambda engine: refusal if engine == "userfaultfd" else "")
    monkeypatch.setattr(module, "_soft_dirty", lambda: "")
    assert tuple(facility.available for facility in probe()[:3]) == available
    assert {facility.detail for facility in probe()} <= {"", refusal}


def test_an_error_of_the_system_is_an_answer():
    def refuse():
        raise PermissionError(1, "Operation not permitted")

    assert module._attempt("x", refuse) == Facility("x", False, "[Errno 1] Operation not permitted")


def test_probing_leaves_trackers_alone():
    if refusal := _tracking.probe("userfaultfd"):
        pytest.skip(f"userfaultfd: {refusal}")
    array = dl.zeros(4 * PAGE, "u1")
    with dl.track(array) as tracker:
        array[PAGE] = 1
        probe()
        assert tracker.harvest().indices().tolist() == [1]


def test_an_unknown_engine_is_refused():
    for call in (_tracking.probe, _tracking.open_spans):
        with pytest.raises(ValueError, match="no engine is called 'ptrace'"):
            call("ptrace")
    with pytest.raises(ValueError, match="no engine is called 'ptrace'"):
        _tracking.Span("ptrace", PAGE, 1, PAGE)


@pytest.mark.parametrize("address", [PAGE, PAGE + 1])
def test_a_span_is_at_least_one_byte(address):
    with pytest.raises(ValueError, match="a span is at least one byte"):
        _tracking.Span("mprotect", address, 0, PAGE)


@pytest.mark.parametrize(
    ("permissions", "path", "writers"),
    [
        ("rw-p", "", "private"),
        ("rw-p", "/anon_hugepage (deleted)", "private"),
        ("rw-p", "/some/file", "lenders"),
        ("rw-s", "/dev/zero (deleted)", "heirs"),
        ("rw-s", "/anon_hugepage (deleted)", "heirs"),
        ("rw-s", "/memfd:x (deleted)", "anyone"),
        ("r--s", "/some/file", "anyone"),
    ],
)
def test_a_mapping_knows_who_may_write_it_unseen(permissions, path, writers):
    assert Mapping(0, PAGE, permissions, PAGE, path, (0, 1, 17 if path else 0)).writers == writers


def test_the_mappings_of_a_range_cover_it():
    array = dl.zeros(3 * PAGE, "u1")
    found = mappings_of(array.ctypes.data, array.nbytes)
    assert found[0].start <= array.ctypes.data
    assert found[-1].end >= array.ctypes.data + array.nbytes
    assert mappings_of(0, 1) == []
