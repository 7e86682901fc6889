"""Build dirtylog as on a system that is not Linux, and use it: what needs Linux is absent, and cannot be compiled.

``python tools/portable.py [--scratch DIR] [pytest arguments]``: in a copy of the checkout, with ``DIRTYLOG_PORTABLE=1``
and before the system's own headers those of ``HIDDEN``, which end a compilation. Then what is to be there is used, what
is not must raise `BackendUnavailable`, and the tests of the bits, the model and the log are run. ``--compile``: no copy
and no tests; the C that an earlier build has left in ``build/`` is checked by the compiler alone, in seconds.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import scratch

# What a system that is not Linux may lack, or have another one of.
HIDDEN = [
    *(f"sys/{name}.h" for name in ("epoll", "eventfd", "ioctl", "mman", "prctl", "ptrace", "syscall", "uio", "user")),
    *(f"linux/{name}.h" for name in ("fs", "futex", "kvm", "userfaultfd", "vhost_types", "virtio_ring")),
]
# The modules that setup.py leaves out.
NOT_PORTABLE = ("sinks/", "sources/kvm/", "sources/process/")
TESTS = ("tests/core", "tests/vm", "tests/log")
USE = """
import numpy as np
import dirtylog as dl
from dirtylog.sources import _backing
bitmap = dl.DirtyBitmap(1 << 20)
bitmap.mark_pages([3, 4, 900])
assert bitmap.harvest().runs().tolist() == [[3, 2], [900, 1]]
vm = dl.VM()
vm.set_memory_region(0, 0, 64)
vm.vcpus[0].write(5 * 4096, b"hello")
assert vm.get_dirty_log(0).indices().tolist() == [5]
array = np.zeros(1 << 16, np.uint8)
log = dl.DirtyLog()
with dl.track(array) as tracker:
    assert tracker.backend == "compare", tracker.backend
    log.attach(tracker)
    observer = log.observer("one")
    array[5000] = 1
    with observer.collect() as epoch:
        assert epoch.pages.count == 1
refused = {
    "userfaultfd": lambda: dl.track(array, backend="userfaultfd"),
    "mprotect": lambda: dl.track(array, backend="mprotect"),
    "kvm": lambda: __import__("dirtylog.sources.kvm"),
    "attach": lambda: dl.attach(1),
    "snapshot": lambda: __import__("dirtylog.sinks.snapshot"),
}
for name, use in refused.items():
    try:
        use()
    except dl.BackendUnavailable as error:
        print(f"{name}: {error}")
    else:
        raise SystemExit(f"{name} works, and should not be there")
"""


def hide(directory: Path) -> Path:
    """Make headers that end a compilation."""
    hidden = directory / "hidden"
    for name in HIDDEN:
        (hidden / name).parent.mkdir(parents=True, exist_ok=True)
        (hidden / name).write_text(f'#error "<{name}> is not everywhere"\n')
    return hidden


def is_portable(file: Path) -> bool:
    """Whether a file of the package is compiled on every system."""
    return not str(file).startswith(NOT_PORTABLE)


def compile_what_is_built(hidden: Path) -> int:
    """Check the translated modules; return how many cannot be compiled."""
    flags = [
        "-fsyntax-only",
        "-std=gnu11",
        "-w",
        "-U__linux__",
        "-U__linux",
        "-Ulinux",
        "-U__gnu_linux__",
        f"-I{hidden}",
    ]
    flags += ["-Idirtylog/include", "-Idirtylog", f"-I{sysconfig.get_paths()['include']}"]
    stores = sorted(scratch.ROOT.glob(f"build/{sys.implementation.cache_tag}-*/cython"), key=os.path.getmtime)
    if not stores:
        raise SystemExit("nothing is built here: python setup.py build_ext --inplace")
    package = scratch.ROOT / "dirtylog"
    modules = [file for file in sorted(package.rglob("*.pyx")) if is_portable(file.relative_to(package))]
    files = [stores[-1] / file.relative_to(scratch.ROOT).with_suffix(".c") for file in modules]
    files += [file for file in sorted(package.rglob("*.c")) if is_portable(file.relative_to(package))]
    failed = 0
    for file in files:
        done = subprocess.run(["gcc", *flags, str(file)], cwd=scratch.ROOT, capture_output=True, text=True, check=False)
        failed += done.returncode != 0
        if done.returncode:
            print(f"{file}:\n{done.stderr[:2000]}")
    print(f"{len(files)} files compile without Linux, {failed} do not" if failed else f"{len(files)} files compile")
    return failed


def main() -> int:
    """Build, use, test; 0 if all of it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scratch.add_argument(parser)
    parser.add_argument("--compile", action="store_true", help="check what is built here, and nothing else")
    options, pytest_arguments = parser.parse_known_args()
    with scratch.directory(options.scratch, "portable") as target:
        hidden = hide(target)
        if options.compile:
            return compile_what_is_built(hidden) != 0
        copy = scratch.copy(target / "copy")
        environment = {**os.environ, "DIRTYLOG_PORTABLE": "1", "CFLAGS": f"-I{hidden}"}
        scratch.build(copy, environment)
        subprocess.run([sys.executable, "-c", USE], cwd=copy, check=True)
        arguments = pytest_arguments or ["-q", *TESTS]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(
            command, cwd=copy, env={"DIRTYLOG_HYPOTHESIS": "few", **os.environ}, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
