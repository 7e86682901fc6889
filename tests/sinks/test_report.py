"""The HTML report: it stands alone, says what the trace says, and a real browser draws it without asking anybody."""

import json
import os
import re
import subprocess

import numpy as np
import pytest

import dirtylog as dl

pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")
image = pytest.importorskip("matplotlib.image", reason="matplotlib (extra: plot) is not installed")

from dirtylog.sinks.report import report_html  # noqa: E402
from dirtylog.sinks.trace import Recorder, Trace  # noqa: E402


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "a<b>&.parquet"
    random = np.random.default_rng(1)
    with Recorder(path, 4096) as recorder:
        for i in range(1, 100):
            numbers = np.concatenate([random.integers(0, 4096, 50), np.arange(100) + 30 * i])
            recorder.write(i / 10, dl.DirtyPages.from_indices(numbers, 4096, exact=i != 7))
        recorder.regions["<script>alert(1)</script>"] = (0, 2000)
    return path


@pytest.fixture(scope="module")
def page(recording):
    with Trace(recording) as trace:
        return report_html(trace, bandwidths=[4e6, 1e8], downtime=0.01)


def test_the_page_says_what_the_trace_says(page):
    assert "4096 pages of 4096 bytes, 16.00 MiB" in page
    assert "99 epochs in 9.900 s" in page
    assert "<td>inexact epochs</td><td>1</td>" in page
    assert page.count("<img ") == 4
    assert page.count("<td>converges</td>") == 1


def test_the_page_asks_nobody(page):
    sources = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"'\s>)]+)", page)
    assert len(sources) == 5
    assert all(source.startswith("data:") for source in sources)
    assert "default-src 'none'" in page
    assert "<script" not in page


def test_names_from_the_trace_are_text(page):
    assert "a&lt;b&gt;&amp;.parquet" in page
    assert "&lt;script&gt;alert(1)" in page


def test_the_same_trace_makes_the_same_page(page, recording):
    with Trace(recording) as trace:
        assert report_html(trace, bandwidths=[4e6, 1e8], downtime=0.01) == page


@pytest.fixture
def browser(tmp_path, browser_path):
    def browse(file, *options):
        command = [
            browser_path,
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            "--headless",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path / 'profile'}",
            *options,
            file.as_uri(),
        ]
        # A sanitizer that is loaded before this Python is not the browser's.
        environment = {**os.environ, "LD_PRELOAD": ""}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)

    return browse


def test_a_browser_draws_every_chart_and_requests_nothing(page, browser, tmp_path):
    file, shot, log = tmp_path / "report.html", tmp_path / "shot.png", tmp_path / "net.json"
    file.write_text(page, encoding="utf-8")
    browser(file, f"--screenshot={shot}", "--window-size=1000,2600", "--hide-scrollbars", f"--log-net-log={log}")
    pixels = (image.imread(shot)[..., :3] * 255).round().astype(int)

    def has(color, tolerance=6):
        return (np.abs(pixels - color).max(axis=2) <= tolerance).sum()

    # The colours of the charts: the map's darkest, the rate's and the pauses', the rounds'.
    assert has([0, 0, 4]) > 10_000
    assert has([0xC2, 0x41, 0x0C], 60) > 1000
    assert has([0x03, 0x69, 0xA1]) > 10_000
    # Two migrations, one below the other, and the page is not cut off before the second.
    rows = np.flatnonzero((np.abs(pixels - [0x03, 0x69, 0xA1]).max(axis=2) <= 6).any(axis=1))
    assert (np.diff(rows) > 50).sum() == 1
    assert asked_by_the_page(log) <= {file.as_uri()}


def test_the_check_for_requests_would_see_one(browser, tmp_path):
    file, log = tmp_path / "asks.html", tmp_path / "net.json"
    file.write_text("<img src='http://picture.invalid/x.png'>", encoding="utf-8")
    browser(file, "--dump-dom", f"--log-net-log={log}")
    assert "http://picture.invalid/x.png" in asked_by_the_page(log)


def asked_by_the_page(log):
    """The addresses that a page asked for: the browser's own business has no origin."""
    found = set()
    for event in json.loads(log.read_text(encoding="utf-8"))["events"]:
        params = event.get("params", {})
        if params.get("url") and params.get("initiator", "not an origin") != "not an origin":
            found.add(params["url"])
    return found
