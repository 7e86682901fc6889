"""The profiler: what it counts (over areas of the test's own), and that a program runs as it would without it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import dirtylog as dl
from dirtylog.commands.profile import report_text
from dirtylog.sinks.profile import Profiler
from dirtylog.sinks.profile.account import Account
from dirtylog.sinks.profile.own_memory import Area
from dirtylog.sinks.rate import Peak

from .. import warm

PAGE = 4096

# ---- accounting, over areas and a clock of the test's own -----------------------------------------


class Memory:
    """Areas that come and go, each a bitmap; what `lose` names answers inexactly, what is gone raises."""

    def __init__(self):
        self.bitmaps, self.populated, self.now = {}, {}, 50.0
        self.closed = []

    def add(self, start, npages, populated=()):
        area = Area(start * PAGE, (start + npages) * PAGE, "")
        self.bitmaps[area] = dl.DirtyBitmap(npages)
        self.populated[area] = dl.DirtyPages.from_indices(list(populated), npages)
        return area

    def track(self, area):
        memory = self

        class Tracker:
            npages, page_size = memory.bitmaps[area].npages if area in memory.bitmaps else 256, PAGE
            bitmap = memory.bitmaps.get(area)
            lost = gone = False

            def harvest(self):
                if self.gone:
                    raise dl.DirtyLogError("unmapped")
                return dl.DirtyPages._all(self.npages) if self.lost else self.bitmap.harvest()

            def close(self):
                memory.closed.append(area)

        self.tracker = Tracker()
        return self.tracker


@pytest.fixture
def memory():
    return Memory()


@pytest.fixture
def profiler(memory, monkeypatch):
    monkeypatch.setattr("dirtylog.sinks.profile.own_memory.price_of_a_first_write", lambda track: 1e-6)
    return Profiler(
        interval=1.0,
        every=[1.0, 2.0, 100.0],
        find=lambda: list(memory.bitmaps),
        track=memory.track,
        populated=lambda area, size: memory.populated[area],
        label=lambda area: f"area {area.start // PAGE}",
        clock=lambda: memory.now,
    )


def step(profiler, memory, area, pages):
    memory.bitmaps[area].mark_pages(pages)
    memory.now += 1.0
    profiler.sample()


def finish(profiler, memory):
    memory.now += 1.0
    return profiler.stop()


def test_a_profile_adds_up_what_each_sample_wrote(profiler, memory):
    area = memory.add(100, 50, populated=range(50))
    profiler.start(thread=False)
    for _ in range(4):
        step(profiler, memory, area, range(10))
    profile = finish(profiler, memory)
    assert (profile.seconds, profile.samples, profile.dirtied_bytes) == (5.0, 5, 40 * PAGE)
    assert profile.bytes_per_second == 8 * PAGE
    assert profile.peak_bytes_per_second == 10 * PAGE
    assert profile.exact
    assert profile.overhead["first_writes_seconds"] == pytest.approx(40e-6)
    assert memory.closed == [area]


def test_snapshots_of_each_rhythm_hold_different_pages(profiler, memory):
    area = memory.add(100, 50)
    profiler.start(thread=False)
    for pages in (range(10), range(10), range(5), range(5, 12)):
        step(profiler, memory, area, pages)
    profile = profiler.stop()
    assert [(s.every, s.count) for s in profile.snapshots] == [(1.0, 4), (2.0, 2), (100.0, 0)]
    assert [s.max_bytes for s in profile.snapshots] == [10 * PAGE, 12 * PAGE, 0]
    assert profile.snapshots[0].mean_bytes == 8 * PAGE


def test_hot_mappings_come_first(profiler, memory):
    cold, hot = memory.add(100, 50), memory.add(200, 50)
    memory.add(300, 50)
    profiler.start(thread=False)
    memory.bitmaps[cold].mark(3)
    step(profiler, memory, hot, range(3))
    profile = finish(profiler, memory)
    assert [(m.name, m.address, m.size, m.dirtied_bytes, m.share) for m in profile.mappings] == [
        ("area 200", 200 * PAGE, 50 * PAGE, 3 * PAGE, 0.75),
        ("area 100", 100 * PAGE, 50 * PAGE, PAGE, 0.25),
    ]


def test_an_area_that_appears_counts_with_what_it_holds(profiler, memory):
    profiler.start(thread=False)
    area = memory.add(100, 50, populated=[1, 2])
    step(profiler, memory, area, [])
    step(profiler, memory, area, [2])
    assert finish(profiler, memory).dirtied_bytes == 3 * PAGE


def test_an_area_that_is_unmapped_is_let_go_of(profiler, memory):
    area, stays = memory.add(100, 50), memory.add(200, 50)
    profiler.start(thread=False)
    step(profiler, memory, area, [1])
    memory.bitmaps.pop(area)
    step(profiler, memory, stays, [1])
    assert memory.closed == [area]
    profile = finish(profiler, memory)
    assert (profile.dirtied_bytes, len(profiler.log.sources)) == (2 * PAGE, 1)


@pytest.mark.parametrize("how", ["lost", "gone"])
def test_an_area_that_was_replaced_counts_as_a_new_one(profiler, memory, how):
    """The same addresses, other memory: its populated pages were written, and not the 50 that it has."""
    area = memory.add(100, 50, populated=[7, 8])
    profiler.start(thread=False)
    setattr(memory.tracker, how, True)
    step(profiler, memory, area, [])
    step(profiler, memory, area, [1])
    profile = finish(profiler, memory)
    assert (profile.dirtied_bytes, profile.exact) == (3 * PAGE, True)
    assert profiler.regions == {f"area 100 at {100 * PAGE:#x}": (0, 50)}


def test_an_area_that_comes_back_takes_its_old_place(profiler, memory):
    profiler.start(thread=False)
    for _ in range(5):
        area = memory.add(100, 50, populated=[0])
        step(profiler, memory, area, [])
        memory.bitmaps.pop(area)
        memory.now += 1.0
        profiler.sample()
    assert profiler.log.npages == 50
    assert finish(profiler, memory).dirtied_bytes == 5 * PAGE


def test_a_profile_can_be_recorded(profiler, memory):
    seen = []
    profiler._on_sample = lambda time, pages: seen.append((time, list(pages)))
    area = memory.add(100, 50)
    profiler.start(thread=False)
    step(profiler, memory, area, [3])
    finish(profiler, memory)
    assert seen == [(1.0, [3]), (2.0, [])]


def test_a_profiler_refuses_nonsense():
    for interval, every in ((0, [1]), (1, [0]), (-1, [1])):
        with pytest.raises(ValueError, match="positive numbers of seconds"):
            Profiler(interval=interval, every=every)


# ---- a real program -------------------------------------------------------------------------------

# The peak is over windows of one length, whatever the samples' lengths are.


def test_a_last_sample_of_a_few_milliseconds_makes_no_peak():
    peak = Peak(0.0)
    for second in range(1, 6):
        peak.add(float(second), 16)
    peak.add(5.002, 1)
    assert peak.bytes_per_second == pytest.approx(16, rel=0.1)


def test_short_samples_are_joined_to_windows_and_a_single_one_is_not_a_second():
    peak = Peak(0.0)
    for i, nbytes in enumerate([0, 100, 0, 0, 0, 0, 0, 0, 0, 0, 30, 30, 30, 30, 30, 0, 0, 0, 0, 0]):
        peak.add((i + 1) / 10, nbytes)
    assert peak.bytes_per_second == pytest.approx(150, rel=0.35)
    assert peak.bytes_per_second < 300


def test_what_a_window_begins_with_is_not_lost_when_the_next_sample_makes_it_too_long():
    peak = Peak(0.0)
    peak.add(0.04, 100)
    for end in (0.2, 0.8, 0.99, 1.2):
        peak.add(end, 0)
    assert peak.bytes_per_second == pytest.approx(100 / 0.99)


def test_what_is_shorter_than_a_window_is_all_there_is():
    peak = Peak(10.0)
    assert peak.bytes_per_second == 0
    peak.add(10.25, 100)
    assert peak.bytes_per_second == 400


LAUNCHER = """
import argparse, sys
from dirtylog.commands import {command} as command
parser = argparse.ArgumentParser()
command.add_arguments(parser)
sys.exit(command.run(parser.parse_args()))
"""


@pytest.fixture(scope="module")
def attaching():
    """Skip where a program cannot be watched from outside."""
    from dirtylog.sources.process.launch import launch

    try:
        with launch(["true"]) as program:
            program.wait(60)
    except dl.BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def userfaultfd():
    try:
        from dirtylog.sinks.profile.own_memory import price_of_a_first_write, track_area

        price_of_a_first_write(track_area)
    except dl.BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def launch(tmp_path, attaching, unprofiled):
    def launch(program, *args, command="profile", options=(), plain=False):
        script = tmp_path / "program.py"
        script.write_text(textwrap.dedent(program), encoding="utf-8")
        if plain:
            return subprocess.run([sys.executable, script, *args], capture_output=True, text=True, input="in\n")
        return warm.run(LAUNCHER.format(command=command), *options, script, *args, input="in\n")

    return launch


PROGRAMS = {
    "prints": "import sys, os; print(sys.argv[1:], __name__, os.path.samefile(__file__, sys.argv[0]), input())",
    "path": "import sys, os; print(sys.path, sys.orig_argv[1:], __doc__, __spec__, __package__, sys.flags)",
    "modules": "import sys, warnings; print(sorted(sys.modules), warnings.filters)",
    "exits with a number": "import sys; sys.exit(7)",
    "exits with a text": "import sys; sys.exit('no')",
    "raises": "def f():\n    raise ValueError('bad')\nf()",
    "interrupted": "import atexit\natexit.register(print, 'last')\nraise KeyboardInterrupt",
    "terminated": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
    "killed": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "ends at once": "import os; os._exit(4)",
    "not Python": "def (",
    "threads": (
        "import threading\nprint(threading.active_count())\nready = threading.Event()\n"
        "threading.Thread(target=lambda: (ready.wait(), print('thread'))).start()\nprint('main')\nready.set()"
    ),
    "an executor that nobody shuts down": (
        "from concurrent.futures import ThreadPoolExecutor\nprint(ThreadPoolExecutor(2).submit(sum, [1, 2]).result())"
    ),
    "forks": (
        "import os\npid = os.fork()\nif not pid:\n    print('child', flush=True)\n    raise SystemExit(3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    ),
    "descriptors": "import os; print([x for x in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{x}')])",
    "executes": "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(6)'])",
    "goes elsewhere": "import os; os.chdir('/')",
    "processes": (
        "import multiprocessing as mp\ndef f(x): return x * x\nif __name__ == '__main__':\n"
        "    with mp.get_context('spawn').Pool(1) as pool: print(pool.map(f, [3]))"
    ),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_a_program_runs_as_it_would_without(launch, tmp_path, program):
    report = tmp_path / "report"
    plain = launch(program, "a", "-b", "--interval", plain=True)
    profiled = launch(program, "a", "-b", "--interval", options=["--output", str(report)])
    assert (profiled.returncode, profiled.stdout, profiled.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert "dirtied per second" in report.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["program.py", "report"]


# Ends at once, so that what it holds is still there: an interpreter that ends in order gives it back first.
WRITER = """
import os, sys
import numpy as np
array = np.zeros(8000 * 4096, np.uint8)
array[:] = 1
for i in range(int(sys.argv[1])):
    array[:] += 1
print("done", flush=True)
os._exit(0)
"""


def test_a_profile_counts_what_the_program_wrote_until_its_end(launch):
    result = launch(WRITER, "0", options=["--json", "--interval", "1000"])
    assert result.stdout == "done\n"
    profile = json.loads(result.stderr)
    # What the program writes is known: 8000 pages, once. Without a GIL, importing NumPy writes as many to mimalloc's.
    written = next(mapping for mapping in profile["mappings"] if mapping["name"] != "mimalloc")
    assert written["dirtied_bytes"] == pytest.approx(8000 * PAGE, rel=0.1)
    assert profile["missed"] is None


def test_the_start_of_an_interpreter_is_not_in_the_figures(launch):
    profile = json.loads(launch("import os; os._exit(0)", options=["--json", "--interval", "1000"]).stderr)
    assert profile["dirtied_bytes"] < 600 << 10  # what compiling and running the one line takes


SLEEPER = """
import os, signal
print(os.getpid(), flush=True)
signal.pause()
"""


def test_a_python_script_that_sleeps_writes_nothing(tmp_path, attaching, unprofiled):
    script, report = tmp_path / "program.py", tmp_path / "report"
    script.write_text(SLEEPER)
    words = ["--json", "--output", report, "--interval", "0.05", "--duration", "0.2", script]
    with warm.started(LAUNCHER.format(command="profile"), *words) as process:
        sleeper = int(process.stdout.readline())
        try:
            while not (text := report.read_text()).endswith("}\n"):
                time.sleep(0.01)
        finally:
            os.kill(sleeper, signal.SIGKILL)
    profile = json.loads(text)
    assert profile["peak_bytes_per_second"] < 100 << 10
    assert profile["bytes_per_second"] < 100 << 10
    assert 0 < profile["starting"]["dirtied_bytes"] < 4 << 20


# Ended by a signal while it sleeps: it writes nothing at its end.
WRITES_AT_ONCE = """
import signal
kept = b"1" * (20 << 20)
signal.setitimer(signal.ITIMER_REAL, 0.2)
signal.pause()
"""


@pytest.mark.parametrize("options", [(), ("--arrays",)], ids=["as it is", "with a module of ours"])
def test_what_a_script_writes_at_once_is_its_own_and_not_its_start(launch, options):
    result = launch(WRITES_AT_ONCE, options=["--json", "--interval", "0.05", *options])
    assert result.returncode == -signal.SIGALRM
    profile = json.loads(result.stderr)
    assert profile["starting"] == {"seconds": 0.0, "dirtied_bytes": 0}
    assert profile["peak_bytes_per_second"] >= (20 << 20) / profile["seconds"]


def account_of(*samples):
    account = Account(1.0, [1.0])
    account.begin(10.0)
    page = 0
    for moment, npages, *part in samples:
        account.add(moment, dl.DirtyPages.from_runs([[page, npages]], 100), {"all": (0, 100)}, *part)
        page += npages
    return account


def summed(account):
    return account.sum_up(4096, lambda key: (key, 0, 0), inside=False)


def test_start_and_end_of_a_program_are_in_the_total_and_in_neither_mean_nor_peak():
    account = account_of((10.5, 20, "start"), (12.5, 2), (12.75, 3, "end"), (13.0, 4, "end"))
    for _ in range(2):
        profile = summed(account)
        assert profile.dirtied_bytes == profile.mappings[0].dirtied_bytes == 29 * 4096
        assert profile.bytes_per_second == 4096
        assert profile.peak_bytes_per_second == 4096
        assert profile.starting == {"seconds": 0.5, "dirtied_bytes": 20 * 4096}
        assert profile.ending == {"seconds": 0.5, "dirtied_bytes": 7 * 4096}
        assert profile.seconds == 3.0
        assert account.program == (0.5, 2.5)
    text = report_text(profile)
    assert "4.0 KiB dirtied per second (peak 4.0 KiB), 116.0 KiB in 3.00 s" in text
    assert "its start: 80.0 KiB in the first 500 ms" in text
    assert "its end: 28.0 KiB in the last 500 ms" in text
    assert "overhead: about" in text


def test_an_end_that_is_much_of_what_was_seen_counts_like_the_rest():
    account = account_of((11.0, 1), (13.0, 1, "end"))
    profile = summed(account)
    assert profile.bytes_per_second == pytest.approx(2 * 4096 / 3)
    assert profile.ending == {"seconds": 0.0, "dirtied_bytes": 0}
    assert account.program == (0.0, 3.0)


def test_a_program_can_be_recorded(launch, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")
    from dirtylog.sinks.trace import Trace

    path = tmp_path / "trace.parquet"
    result = launch(WRITER, "1", command="record", options=["--interval", "1000", str(path)])
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")
    with Trace(path) as trace:
        # The moment of its end may be a sample of its own.
        assert trace.length in (1, 2)
        pages = np.concatenate([trace.harvest().indices() for _ in range(trace.length)])
        counts = [((pages >= first) & (pages < first + count)).sum() for first, count in trace.regions.values()]
        assert max(counts) >= 8000
        # The page space ends with what was used.
        assert trace.npages < 1 << 20


@pytest.mark.parametrize(
    "words",
    [["-m", "program"], ["-c", "import program"], ["--", sys.executable, "program.py"]],
    ids=lambda words: words[0],
)
def test_modules_code_and_commands_run_too(launch, tmp_path, words):
    (tmp_path / "program.py").write_text("import sys; print(sys.argv[1:]); sys.exit(5)")
    code = "import sys; from dirtylog import cli; sys.exit(cli.main())"
    result = warm.run(code, "profile", "--output", "report", *words, "-x", "--", "y", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (5, "['-x', '--', 'y']\n", "")
    assert "dirtied per second" in (tmp_path / "report").read_text()


@pytest.mark.parametrize("words", [["profile", "--output", "report"], ["record", "trace"]], ids=lambda words: words[0])
def test_after_two_dashes_a_command_is_run_whatever_its_name(attaching, unprofiled, tmp_path, words):
    """As the kernel runs it, and not by our interpreter: a name that ends in .py is none of Python's then."""
    pytest.importorskip("pyarrow", reason="pyarrow (extra: trace) is not installed")
    command = tmp_path / "command.py"
    command.write_text("#!/bin/sh\nexit 7\n")
    command.chmod(0o755)
    code = "import sys; from dirtylog import cli; sys.exit(cli.main())"
    assert warm.run(code, *words, "--", "./command.py", cwd=tmp_path).returncode == 7


SHARES = """
import mmap, os
memory = mmap.mmap(-1, 16 << 20)
memory[::4096] = b"1" * 4096
for child in range(2):
    if not os.fork():
        memory[child * 4096] = 7
        os._exit(0)
    os.wait()
os._exit(0)
"""


@pytest.mark.parametrize("trust", [[], ["--trust-shared"]], ids=["by default", "if it is trusted"])
def test_memory_that_is_shared_is_an_upper_bound_unless_those_who_are_watched_are_all(launch, trust):
    result = launch(SHARES, options=["--json", "--interval", "1000", *trust])
    profile = json.loads(result.stderr)
    assert profile["exact"] is bool(trust)
    assert profile["dirtied_bytes"] >= 16 << 20


def test_a_program_that_another_has_become_is_in_the_trace(launch):
    """What was written before the exec, and after it: a page is counted wherever it was."""
    after = "import os, mmap; m = mmap.mmap(-1, 700 * 4096, 2); m[:] = b'1' * len(m); os._exit(0)"
    program = f"""
        import mmap, os, sys
        m = mmap.mmap(-1, 900 * 4096, mmap.MAP_PRIVATE)
        m[:] = b"1" * len(m)
        os.execv(sys.executable, [sys.executable, "-c", {after!r}])
    """
    result = launch(program, options=["--json", "--interval", "1000"])
    assert result.stderr.startswith("{"), result.stderr
    sizes = [mapping["dirtied_bytes"] // PAGE for mapping in json.loads(result.stderr)["mappings"]]
    assert 900 in sizes


def test_a_real_array_is_counted_page_by_page(userfaultfd):
    """By the real tracker, sample by sample: what is written in between, and nothing else."""
    import mmap

    import numpy as np

    from dirtylog.sinks.profile import own_memory

    with mmap.mmap(-1, 2048 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        pages = np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE]
        start = pages.__array_interface__["data"][0]
        area = own_memory.Area(start, start + len(memory), "")
        assert any(start >= found.start and area.end <= found.end for found in own_memory.large_areas())
        areas, seen, now = [], [], iter(range(100))
        profiler = Profiler(find=lambda: areas, clock=lambda: next(now), on_sample=lambda _, p: seen.append(p.count))
        profiler.start(thread=False)
        pages[:100] = 1
        areas.append(area)
        profiler.sample()
        pages[50:60] = 2
        profiler.sample()
        pages[1000:2000] += 1
        profile = profiler.stop()
        del pages
    assert seen == [100, 10, 1000]
    assert profile.mappings[0].dirtied_bytes == 1110 * mmap.PAGESIZE
