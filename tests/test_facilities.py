"""A test run says which facilities it found, so that nobody takes a skipped test for one that passed."""

import pytest


def header(config):
    lines = []
    for answer in config.hook.pytest_report_header(config=config, start_path=config.rootpath):
        lines += [answer] if isinstance(answer, str) else answer
    return lines


@pytest.fixture(scope="module")
def said(request):
    """The header of this run: each probe is asked once."""
    return header(request.config)


@pytest.mark.parametrize(
    "facility",
    ["KVM", "userfaultfd", "PAGEMAP_SCAN", "mprotect", "soft-dirty", "SIMD", "C compiler", "spin", "browser"],
)
def test_the_header_of_a_run_has_the_probes_answer(facility, said):
    answers = [line for line in said if line.startswith(f"{facility}: ")]
    assert len(answers) == 1
    assert answers[0].startswith((f"{facility}: yes, ", f"{facility}: no, "))


def test_a_program_that_is_not_there_is_said_not_to_be(request, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "spin: no, none of spin is on PATH" in header(request.config)
    (tmp_path / "spin").touch(0o755)
    assert f"spin: yes, {tmp_path / 'spin'}" in header(request.config)
