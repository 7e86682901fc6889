"""The HTML report: a real browser draws it, asks nobody, and says what Python says of the same trace."""

import importlib.util
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

import dirtylog as dl

pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")

from dirtylog.sinks.report import report_html
from dirtylog.sinks.trace import Recorder, Trace, what_if
from dirtylog.sinks.trace.digest import digest

HOSTILE = "</script><script>alert(1)</script>"
BANDWIDTHS, DOWNTIME = [1.7e7, 1e8], 0.013
CHARTS = ["map", "rate", "regions", "again", "often", "snap", "store", "rounds"]
PAGES_PER_SECOND = 4096  # 16 MiB


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Write 16 MiB per second into an array of 48 MiB, steadily; samples come when they can, the last very soon."""
    path = tmp_path_factory.mktemp("trace") / "a<b>&.parquet"
    random = np.random.default_rng(1)
    array, other, unused = (0, 12288), (12288, 2048), (14336, 6000)
    times = [*(np.arange(1, 33) / 4 + random.uniform(-0.02, 0.02, 32)).tolist(), 8.03]
    with Recorder(path, 20336) as recorder:
        written = 0
        for number, time in enumerate(times, 1):
            reach = int(time * PAGES_PER_SECOND)
            pages = np.arange(written, reach) % array[1]
            noise = other[0] + random.integers(0, other[1], 12)
            written = reach
            numbers = np.unique(np.concatenate([pages, noise]))
            recorder.write(time, dl.DirtyPages.from_indices(numbers, 20336, exact=number != 7))
        recorder.regions.update({"weights": array, HOSTILE: other, "unused": unused})
        recorder.about.update(command="train <all>", started="today", machine="here", missed="a child")
    return path


@pytest.fixture(scope="module")
def text(recording):
    with Trace(recording) as trace:
        return report_html(trace, bandwidths=BANDWIDTHS, downtime=DOWNTIME)


def test_the_same_trace_makes_the_same_page(text, recording):
    with Trace(recording) as trace:
        assert report_html(trace, bandwidths=BANDWIDTHS, downtime=DOWNTIME) == text


def test_the_page_is_one_file_that_asks_nobody(text):
    assert len(text.encode()) < 2_000_000
    assert "default-src 'none'" in text
    assert "connect-src" not in text
    own = text.replace((Path(dl.__file__).parent / "sinks/report/plotly-cartesian.min.js").read_text("utf-8"), "")
    assert re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>)]+)", own) == ["data:,", "#licence"]
    assert "Copyright" in own
    assert "plotly" in own


def test_names_from_a_trace_end_no_element(text):
    assert HOSTILE not in text
    assert "a&lt;b&gt;&amp;.parquet" in text
    assert "train &lt;all&gt;" in text


def test_the_page_says_how_exact_it_is(text, tmp_path):
    assert "1 of 33 harvests are upper bounds" in text
    assert '<dt>Not seen</dt><dd class="">a child</dd>' in text
    with Recorder(tmp_path / "exact", 4) as recorder:
        recorder.write(1.0, dl.DirtyPages.from_indices([1], 4))
    with Trace(tmp_path / "exact") as trace:
        assert "every harvest is exact" in report_html(trace)


def test_start_and_end_of_the_program_are_said_and_not_selected(text, tmp_path):
    assert "Start, end" not in text
    assert '"program":null' in text
    with Recorder(tmp_path / "apart", 4096) as recorder:
        for time, count in ((0.5, 512), (1.5, 2), (2.5, 2), (2.75, 1024)):
            recorder.write(time, dl.DirtyPages.from_runs([[0, count]], 4096))
        recorder.program = (0.5, 2.5)
    with Trace(tmp_path / "apart") as trace:
        page = report_html(trace)
    assert '"program":[0.5,2.5]' in page
    assert "2 MiB in 0.5 s while the program was loaded" in page
    assert "4 MiB in 0.25 s while its interpreter took itself down; the time in between is selected" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bandwidths": [0.0]}, "bandwidth is 0"),
        ({"bandwidths": [float("inf")]}, "bandwidth is inf"),
        ({"downtime": -1.0}, "downtime is -1"),
        ({"downtime": float("nan")}, "downtime is nan"),
    ],
)
def test_a_migration_that_cannot_be_is_refused(options, message, recording):
    with Trace(recording) as trace, pytest.raises(ValueError, match=message):
        report_html(trace, **options)


def test_what_is_given_is_not_moved_to_what_a_slider_has(recording):
    with Trace(recording) as trace:
        page = report_html(trace, bandwidths=[12345.0, 3e12], downtime=77.7)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert data["speeds"][data["speed"]] == 12345.0
    assert 3e12 in data["speeds"]
    assert data["pauses"][data["pause"]] == 77.7


def test_the_vendored_library_is_the_one_that_is_named():
    import hashlib

    here = Path(dl.__file__).parent / "sinks/report"
    vendored = json.loads((here / "vendored.json").read_text("utf-8"))
    for name, expected in vendored["files"].items():
        assert hashlib.sha256((here / name).read_bytes()).hexdigest() == expected
    assert f"v{vendored['version']}" in (here / "plotly-cartesian.min.js").read_text("utf-8")[:200]


# ---- in a browser: one for all of them ---------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(browser_path, tmp_path_factory):
    spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    browser = module.Browser(browser_path, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def become(browser, width, scheme="light"):
    """Be a window of this width, by day or in the dark, and wait until the page has drawn itself so."""
    browser.look(width, 844 if width < 640 else 900, scheme=scheme)
    browser.run(f"""new Promise(done => {{
      const drawn = () => document.documentElement.dataset.drawn === "{"narrow" if width < 640 else "wide"} {scheme}";
      const look = () => drawn() ? done(true) : setTimeout(look, 10);
      look();
    }})""")


@pytest.fixture(scope="module")
def page(browser, text, tmp_path_factory):
    """The page, opened once: to load it and to draw it first is most of what a browser does here."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(text, encoding="utf-8")
    browser.look(390, 844, scheme="dark")
    browser.address = file.as_uri()
    browser.open(browser.address + "#t=2,5")
    become(browser, 390, "dark")
    browser.selected_first = said(browser, "selected")
    choose_all(browser)
    return browser


@pytest.fixture(scope="module")
def opened(page):
    """The page as a desktop has it: for all tests that leave it as it was."""
    become(page, 1280)
    return page


def choose_all(browser):
    browser.run("document.getElementById('all').click()")
    browser.run("""new Promise(done => {
      const look = () => document.getElementById("all").hidden ? done() : setTimeout(look, 10);
      look();
    })""")


def said(browser, name):
    return browser.run(f"document.getElementById('{name}').textContent")


def nbytes(text):
    """The first size in a text."""
    number, unit = re.search(r"([\d.]+) (bytes|KiB|MiB|GiB)", text).groups()
    return float(number) * 1024 ** ["bytes", "KiB", "MiB", "GiB"].index(unit)


def check_drawn(browser, width):
    """Every chart has marks, and nothing is wider than the window."""
    found = browser.run("""[...document.querySelectorAll(".chart")].map(chart => {
      const box = chart.getBoundingClientRect();
      const marks = chart.querySelectorAll(".hm image, .scatterlayer path, .barlayer path");
      return [chart.id, marks.length, box.left >= 0 && box.right <= innerWidth, box.height];
    })""")
    assert [name for name, *_ in found] == CHARTS
    for name, marks, inside, height in found:
        assert marks > 0, name
        assert inside, name
        assert height > 100, name
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_a_phone_in_the_dark_draws_every_chart_and_asks_nobody(page):
    become(page, 390, "dark")
    check_drawn(page, 390)
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(16, 21, 29)"
    assert page.selected_first.startswith("Selected: ")
    assert [address for address in page.asked if not address.startswith("data:")] == [page.address]
    assert page.complaints == []


def test_a_desktop_draws_every_chart_and_asks_nobody(opened):
    check_drawn(opened, 1280)
    assert opened.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert [address for address in opened.asked if not address.startswith("data:")] == [opened.address]
    assert opened.complaints == []


def test_the_numbers_on_top_are_those_of_a_steady_writer(opened):
    steady = 16 << 20
    assert nbytes(said(opened, "n-rate")) == pytest.approx(steady, rel=0.05)
    assert nbytes(said(opened, "n-peak")) == pytest.approx(steady, rel=0.10)
    assert nbytes(said(opened, "n-set")) == pytest.approx(48 << 20, rel=0.05)
    assert said(opened, "n-hot") == "weights"
    opened.run("document.getElementById('every').value = 1")
    opened.run("document.getElementById('every').dispatchEvent(new Event('change'))")
    assert nbytes(said(opened, "n-snap")) == pytest.approx(steady, rel=0.05)


def test_the_sliders_say_what_python_says(opened, recording):
    found = opened.run("""(() => {
      const D = JSON.parse(document.getElementById("data").textContent), found = [];
      const [bw, dt, rounds] = ["bw", "dt", "rounds"].map(id => document.getElementById(id));
      for (let i = 0; i < D.speeds.length; i += 7) for (let j = 0; j < D.pauses.length; j += 18) {
        bw.value = i; dt.value = j; dt.dispatchEvent(new Event("input"));
        const { verdict, rounds: list, downtime } = rounds.forecast;
        found.push([D.speeds[i], D.pauses[j], verdict, list.map(r => [r.pages, r.seconds, r.dirtied]), downtime]);
      }
      bw.value = D.speed; dt.value = D.pause; dt.dispatchEvent(new Event("input"));
      return found;
    })()""")
    assert {verdict for _, _, verdict, _, _ in found} == {"converges", "does not converge", "unknown"}
    with Trace(recording) as trace:
        for bandwidth, downtime, verdict, rounds, pause in found:
            expected = what_if(trace, bandwidth, downtime)
            assert verdict == expected.verdict
            assert rounds == [[item.pages, item.seconds, item.dirtied] for item in expected.rounds]
            assert pause == expected.downtime


def middle(browser, chart):
    """Where a chart's plot is: left, top, width, height."""
    browser.run(f"document.getElementById('{chart}').scrollIntoView({{block: 'center'}})")
    return browser.run(f"""(() => {{
      const box = document.querySelector("#{chart} .nsewdrag").getBoundingClientRect();
      return [box.x, box.y, box.width, box.height];
    }})()""")


def test_the_map_says_region_page_and_bytes_under_the_mouse(opened):
    left, top, width, height = middle(opened, "map")
    for x, y in itertools.product(range(5), range(1, 9)):
        opened.mouse("mouseMoved", left + width / 2 + x, top + height * y / 9)
        hover = opened.run("""new Promise(done => setTimeout(() =>
          done([...document.querySelectorAll("#map .hovertext text")].map(t => t.textContent).join()), 60))""")
        if "weights" in hover:
            break
    assert re.search(r"weightspages [\d,]+ to [\d,]+.* (bytes|KiB|MiB) written, \d+ %", hover), hover


def test_a_stretch_of_time_drives_the_other_charts(opened, recording):
    whole = said(opened, "n-set")
    left, top, width, height = middle(opened, "map")
    opened.mouse("mouseMoved", left + width * 0.25, top + height / 2)
    opened.mouse("mousePressed", left + width * 0.25, top + height / 2, button="left", clickCount=1)
    opened.mouse("mouseMoved", left + width * 0.4, top + height / 2, button="left", buttons=1)
    opened.mouse("mouseMoved", left + width * 0.5, top + height / 2, button="left", buttons=1)
    opened.mouse("mouseReleased", left + width * 0.5, top + height / 2, button="left", clickCount=1)
    ranges = opened.run("""new Promise(done => {
      const look = () => document.getElementById("all").hidden ? setTimeout(look, 10) : setTimeout(() =>
        done(["map", "rate", "regions"].map(id => document.getElementById(id).layout.xaxis.range)), 50);
      look();
    })""")
    assert ranges[0] == ranges[1] == ranges[2] == pytest.approx([2.0, 4.0], abs=0.1)
    assert said(opened, "selected").startswith("Selected: ")
    # Two seconds and what the columns at both ends have beside.
    assert 30 << 20 < nbytes(said(opened, "n-set")) < 42 << 20 < nbytes(whole)
    with Trace(recording) as trace:
        start = opened.run("document.getElementById('rounds').forecast.rounds.length") and digest(trace).edges[8]
        expected = what_if(trace, BANDWIDTHS[0], DOWNTIME, start=float(start))
    assert opened.run("document.getElementById('rounds').forecast.downtime") == expected.downtime
    choose_all(opened)
    assert said(opened, "n-set") == whole


def test_it_is_white_on_paper_also_in_the_dark(opened):
    colour = "getComputedStyle(document.body).backgroundColor"
    try:
        become(opened, 1280, "dark")
        assert opened.run(colour) == "rgb(16, 21, 29)"
        opened.look(1280, scheme="dark", media="print")
        assert opened.run(colour) == "rgb(255, 255, 255)"
        assert opened.pdf().startswith(b"%PDF")
    finally:
        opened.look(1280)


def test_the_check_for_requests_would_see_one(browser, tmp_path):
    file = tmp_path / "asks.html"
    file.write_text("<img src='http://picture.invalid/x.png'>", encoding="utf-8")
    browser.open(file.as_uri())
    assert "http://picture.invalid/x.png" in browser.asked
