"""What every test shares: repeatable examples, no thread left behind, stress switches, and what is real here."""

import gc
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A test that fails must fail for everybody: examples follow from the test's
# name, not from chance. DIRTYLOG_HYPOTHESIS=thorough looks further, at random.
settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", parent=settings.get_profile("repeatable"), derandomize=False, max_examples=2000)
# For another interpreter or a sanitizer: what the examples try is the same code, which the full number has tested.
settings.register_profile("few", parent=settings.get_profile("repeatable"), max_examples=15)
settings.load_profile(os.environ.get("DIRTYLOG_HYPOTHESIS", "repeatable"))


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    before = set(threading.enumerate())
    yield
    # zarr keeps the thread of its event loop, and those that encode chunks for it, until the process ends.
    kept = ("zarr_", "asyncio_")
    new = [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]
    left = [thread for thread in new if not thread.name.startswith(kept)]
    assert not left, f"still running: {left}"


@pytest.fixture(autouse=True)
def no_migration_has_a_past():
    """Let a test receive a session that another test's copy has: what is written by hand says zeros."""
    yield
    if sessions := sys.modules.get("dirtylog.sinks.migrate.sessions"):
        sessions._known.clear()


def pytest_collection_finish():
    """Set aside what is there for good: thousands of tests, which every collection of garbage would look through."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.getgroup("conformance", "the conformance suite: tests/conformance").addoption(
        "--source",
        action="append",
        metavar="MODULE:NAME",
        help="ask this source alone, of any package, what every source promises: NAME is a context manager that opens "
        "it, as examples.file_source:opened does (may be repeated)",
    )
    group = parser.getgroup("stress", "stress tests: run with -m stress")
    group.addoption(
        "--stress-seconds", type=float, default=60, help="seconds that the stress tests share (default: %(default)s)"
    )
    group.addoption(
        "--stress-marks",
        type=float,
        default=1e9,
        help="tests that count every mark make so many together (default: %(default)g)",
    )


STRESS = pytest.StashKey()
# What a stress test counts that is a mark, by the name of the function that made it.
MARKS = ("mark_", "merge", "dirtylog_api.mark", "SharedLog")


def pytest_configure(config):
    config.addinivalue_line("markers", "thread_unsafe(reason): pytest-run-parallel runs it in one thread only")
    config.stash[STRESS] = []
    config.stress_key = STRESS


def pytest_collection_modifyitems(config, items):
    """Leave stress tests out unless -m names them, and give those that run their time."""
    stressful = [item for item in items if item.get_closest_marker("stress")]
    if "stress" in config.option.markexpr:
        for item in stressful:
            item.add_marker(pytest.mark.timeout(10 * config.getoption("--stress-seconds") + 600))
        return
    if stressful:
        config.hook.pytest_deselected(items=stressful)
        items[:] = [item for item in items if item not in stressful]


def pytest_terminal_summary(terminalreporter, config):
    counted = config.stash[STRESS]
    if not counted:
        return
    if terminalreporter.getreports("failed") or terminalreporter.getreports("error"):
        terminalreporter.section("stress: something failed, see above; no count is given")
        return
    terminalreporter.section("stress: counted, and nothing lost")
    marks = 0
    for name, counts in counted:
        for what, number in counts.items():
            terminalreporter.write_line(f"{number:>18,}  {what}  ({name})")
            marks += number if what.startswith(MARKS) else 0
    terminalreporter.write_line(f"{marks:>18,}  marks in all, each in exactly one harvest or seen by value; 0 lost")


# Other programs that some tests run, under any of these names.
PROGRAMS = {
    "C compiler": ("cc", "gcc", "clang"),
    "spin": ("spin",),
    "browser": ("chromium", "chromium-browser", "google-chrome", "chrome"),
}


def program(what):
    """Return the path of a program, None if it is not installed."""
    return next(filter(None, map(shutil.which, PROGRAMS[what])), None)


@pytest.fixture(scope="session")
def c_compiler():
    """The compiler that builds extensions for this interpreter, or another one that is installed; skip without any."""
    named = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
    if not (found := named or program("C compiler")):
        pytest.skip(f"no C compiler: none of {', '.join(PROGRAMS['C compiler'])} is on PATH")
    return found


def pytest_report_header():
    """Say of every facility what its probe answered: what is absent here was not tested for real."""
    from dirtylog.commands.info import facilities

    lines = [f"{found.name}: {'yes' if found.available else 'no'}, {found.answer}" for found in facilities()]
    for what, names in PROGRAMS.items():
        path = program(what)
        lines.append(f"{what}: yes, {path}" if path else f"{what}: no, none of {', '.join(names)} is on PATH")
    return lines


# Starts programs of the machine that the tests run for, where this one is another (tools/emulate.py).
EMULATOR = os.environ.get("DIRTYLOG_EMULATOR", "").split()


@pytest.fixture
def c_program(c_compiler, tmp_path):
    """A function: compile a C file, with more of dirtylog/, and return how it ended and what it printed."""
    package = Path(__file__).parents[1] / "dirtylog"
    if not (package / "_bits" / "harvest.h").exists():
        pytest.skip("no source tree")
    flags = ["-std=gnu11", "-O1", "-pthread", "-Wall", "-Werror", "-Wno-unused-function", "-Wno-unused-variable"]
    if EMULATOR:
        flags.append("-static")  # with the C library of that machine, which is not installed on this one

    def run(source, *more):
        # Of its own: threads of one test may compile beside each other, and start what another one writes.
        program = Path(tempfile.mkdtemp(dir=tmp_path)) / source.stem
        files = [source, *(package / name for name in more)]
        command = [c_compiler, *flags, f"-I{package / 'include'}", f"-I{package}", *files, "-o", program]
        subprocess.run(command, check=True)
        answer = subprocess.run([*EMULATOR, program], capture_output=True, text=True)
        return answer.returncode, answer.stdout

    return run


@pytest.fixture(scope="session")
def sanitized():
    """Whether AddressSanitizer watches this process (tools/sanitize.py): it maps terabytes and checks every read."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


@pytest.fixture(scope="session")
def bounded(sanitized):
    """Skip where a bound on a process's address space would be on more than the process."""
    if sanitized:
        pytest.skip("a sanitizer maps terabytes: it runs under no bound on address space")
    if EMULATOR:
        pytest.skip("an emulator's own memory would be under the bound on address space")


@pytest.fixture
def plain_programs(sanitized, monkeypatch):
    """Start programs without the sanitizer of this process: its terabytes of shadow would be watched too."""
    if sanitized:
        monkeypatch.setenv("LD_PRELOAD", "")


@pytest.fixture
def importable(sanitized):
    """Skip where such a program imports dirtylog: what is built for the sanitizer cannot be loaded without it."""
    if sanitized:
        pytest.skip("what imports dirtylog is under the sanitizer, and has its shadow of terabytes to be watched")


@pytest.fixture(scope="session")
def unprofiled(sanitized):
    """Skip where a profile of the whole process is out of the question."""
    if sanitized:
        pytest.skip("a profile tracks every mapping, the sanitizer's shadow of 14 TiB among them")


@pytest.fixture(scope="session")
def browser_path():
    """The browser that draws reports."""
    path = program("browser")
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(PROGRAMS['browser'])} is on PATH")
    return path
