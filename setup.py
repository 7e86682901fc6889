"""Extension modules and build switches; all metadata is in pyproject.toml.

Environment switches, each off by default:

DIRTYLOG_SANITIZE  comma-separated list for -fsanitize=, for example "address,undefined" or "thread"
DIRTYLOG_DEBUG     1: no optimisation, C assertions on
DIRTYLOG_TRACE     1: Cython line tracing, for coverage of the .pyx files (slow)
DIRTYLOG_PORTABLE  1: as on a system that is not Linux: what needs it is not compiled, and says so when it is imported

What is compiled stays in build/, one directory for each set of switches, compiler and Python, and is taken from there
as long as the bytes that it was made of are the same. pip compiles in temporary directories and unpacks a Cython of its
own each time, so neither places nor time stamps say what is up to date. Where all of it is, Cython is not needed, and
tools/build_backend.py does not ask for it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext, customize_compiler, new_compiler

try:
    import Cython
except ImportError:
    Cython = None
try:
    import fcntl
except ImportError:
    fcntl = None

HERE = Path(__file__).parent
PACKAGE = Path("dirtylog")
# Hand-written C that one module links, beside its own .pyx.
C_SOURCES = {
    "dirtylog._bits.blocks": ["dirtylog/_bits/simd.c"],
    "dirtylog.sources.memory._tracking": [
        f"dirtylog/sources/memory/{name}.c"
        for name in ("_spans", "_registry", "_maps", "_uffd", "_faults", "_mprotect")
    ],
    "dirtylog.sources.process._remote": [
        f"dirtylog/sources/process/_{name}.c" for name in ("family", "stops", "inject", "launch")
    ],
}
# What cannot be compiled elsewhere than on Linux. Of other modules the C has a part that refuses.
NEEDS_LINUX = ("dirtylog.sinks.", "dirtylog.sources.kvm.", "dirtylog.sources.process.")
STAND_IN = '''"""Stands for an extension module that this dirtylog was built without."""

from __future__ import annotations

from dirtylog.errors import BackendUnavailable

raise BackendUnavailable(__name__, "it needs Linux, and this dirtylog was built for another system")
'''
# Modules that wait for the kernel, whose time is not spent in their own code. -O3 takes gcc three times as long.
COLD = {
    "dirtylog.sources.kvm._kvm",
    "dirtylog.sources.memory._tracking",
    "dirtylog.sources.process._remote",
}
# What Cython's memoryviews need: a quarter of a megabyte of C for each module that has one, were it not shared.
SHARED = "dirtylog._cython"
DIRECTIVES = {"language_level": "3", "freethreading_compatible": True}


def switch(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


LINUX = sys.platform == "linux" and not switch("DIRTYLOG_PORTABLE")


def extension(name: str, sources: list[str]) -> Extension:
    compile_args = ["-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-function", "-Wno-unused-parameter"]
    link_args = ["-pthread"]
    macros = []
    sanitizers = os.environ.get("DIRTYLOG_SANITIZE")
    if switch("DIRTYLOG_DEBUG"):
        compile_args += ["-O0", "-g3", "-UNDEBUG"]
    elif sanitizers:
        # An optimiser that does more removes what a sanitizer would have reported, and takes twice as long.
        compile_args += ["-O1"]
    else:
        compile_args += ["-O1" if name in COLD or name == SHARED else "-O3"]
        # Python hands on the -g that it was built with, which costs a quarter of the compiler's time.
        if "-g" not in os.environ.get("CFLAGS", ""):
            compile_args += ["-g0"]
    if sanitizers:
        compile_args += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g"]
        link_args += [f"-fsanitize={sanitizers}"]
    if switch("DIRTYLOG_PORTABLE"):
        compile_args += ["-U__linux__", "-U__linux", "-Ulinux", "-U__gnu_linux__"]
    if switch("DIRTYLOG_TRACE"):
        macros += [("CYTHON_TRACE_NOGIL", "1")]
    return Extension(
        name,
        sources=sources,
        include_dirs=["dirtylog/include", "dirtylog"],
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


class BuildExtensions(build_ext):
    """Compile what has changed, side by side, and take the rest from where it was left."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count() or 1

    def is_up_to_date(self) -> bool:
        """Say whether nothing is to be compiled."""
        self.ensure_finalized()
        self.compiler = new_compiler(compiler=self.compiler)
        customize_compiler(self.compiler)
        self.find_store()
        return not self.force and all(map(self.is_built, self.extensions))

    def find_store(self) -> None:
        """Choose the directory of this compiler, this Python and these switches."""
        everything = [
            sysconfig.get_config_vars("EXT_SUFFIX", "CFLAGS", "LDSHARED"),
            sys.version,
            self.compiler.compiler_so,
            self.debug,
            [os.environ.get(f"DIRTYLOG_{name}") for name in ("SANITIZE", "DEBUG", "TRACE", "PORTABLE")],
        ]
        digest = hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:12]
        self.store = Path("build", f"{sys.implementation.cache_tag}-{digest}")

    def build_extensions(self) -> None:
        self.find_store()
        (self.store / "modules").mkdir(parents=True, exist_ok=True)
        self.build_temp = str(self.store / "objects")
        # Whoever builds the same at the same time waits, and finds it done.
        with open(self.store / "lock", "w") as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            stale = [each for each in self.extensions if self.force or not self.is_built(each)]
            if stale and Cython is None:
                raise SystemExit(f"{len(stale)} modules are to be compiled, and Cython is not there: install cython")
            self.records = {each.name: self.record(each) for each in stale}
            self.translate(stale)
            # The longest first, or it would be compiled alone at the end.
            self.extensions.sort(key=lambda each: -sum(os.path.getsize(source) for source in each.sources))
            self.compiled = {each.name for each in stale}
            # Of the files that a build of the same name has left behind, none is trusted.
            self.force = True
            super().build_extensions()
        self.write_stand_ins(Path(self.build_lib))

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self.write_stand_ins(Path())

    def write_stand_ins(self, directory: Path) -> None:
        """Put a refusal in the place of each module that is left out."""
        for name in left_out:
            target = directory.joinpath(*name.split("."))
            target.parent.mkdir(parents=True, exist_ok=True)
            for module in target.parent.glob(f"{target.name}.*.so"):
                module.unlink()
            target.with_suffix(".py").write_text(STAND_IN)

    def build_extension(self, ext: Extension) -> None:
        kept, target = self.kept(ext.name), Path(self.get_ext_fullpath(ext.name))
        if ext.name not in self.compiled:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            shutil.copy2(kept, target)
            return
        kept.with_suffix(".print").unlink(missing_ok=True)
        super().build_extension(ext)
        shutil.copy2(target, kept)
        kept.with_suffix(".print").write_text(json.dumps(self.records[ext.name]))

    def kept(self, name: str) -> Path:
        return self.store / "modules" / f"{name}.so"

    def is_built(self, ext: Extension) -> bool:
        """Say whether a module is made of what is here now: of other files only after one of its own has changed."""
        kept = self.kept(ext.name)
        try:
            cython, files, print_of_them = json.loads(kept.with_suffix(".print").read_text())
            same = print_of_them == self.fingerprint(ext, files)
        except (OSError, ValueError):
            return False
        return same and kept.exists() and (Cython is None or Cython.__version__ == cython)

    def record(self, ext: Extension) -> tuple[str, list[str], str]:
        """Return what a module is made of: Cython's version, its files, and a digest of those."""
        files = {Path(source) for source in ext.sources}
        if ext.name != SHARED:
            from Cython.Build.Dependencies import create_dependency_tree

            known = create_dependency_tree(quiet=True).all_dependencies(ext.sources[0])
            files |= {Path(os.path.relpath(file)) for file in known if HERE in Path(file).resolve().parents}
        names = sorted(map(str, files))
        return Cython.__version__, names, self.fingerprint(ext, names)

    def fingerprint(self, ext: Extension, files: list[str]) -> str:
        """Return a digest of flags, and of the bytes of some files and of all headers."""
        inputs = [ext.extra_compile_args, ext.extra_link_args, ext.define_macros, DIRECTIVES, SHARED]
        # A declaration file that is new may come before one that there was.
        inputs.append(sorted(map(str, PACKAGE.rglob("*.pxd"))))
        found = hashlib.sha256(json.dumps(inputs).encode())
        headers = [] if ext.name == SHARED else map(str, PACKAGE.rglob("*.h"))
        for file in sorted({*files, *headers}):
            found.update(f"\0{file}\0".encode() + Path(file).read_bytes())
        return found.hexdigest()

    def translate(self, stale: list[Extension]) -> None:
        """Turn the .pyx of these into C, side by side."""
        if not stale:
            return
        from Cython.Build import cythonize

        place = self.store / "cython"
        # Cython puts a copy of each header beside its C, and keeps one that is younger than the original.
        for header in PACKAGE.rglob("*.h"):
            copied = place / header
            if copied.exists() and copied.read_bytes() != header.read_bytes():
                copied.unlink()
        shared = next((each for each in stale if each.name == SHARED), None)
        modules = [each for each in stale if each is not shared]
        process = None
        for each in self.extensions:
            if each.name == SHARED:
                each.sources = [str(place / "_cython.c")]
        if shared:
            place.mkdir(parents=True, exist_ok=True)
            directives = [f"-X{name}={value}" for name, value in DIRECTIVES.items()]
            command = [sys.executable, "-m", "cython", *directives, "--generate-shared", shared.sources[0]]
            process = subprocess.Popen(command)
        translated = cythonize(
            modules,
            nthreads=min(os.cpu_count() or 1, len(modules)) if len(modules) > 1 else 0,
            build_dir=str(place),
            # An unpacked Cython is always younger than what it has written.
            force=True,
            compiler_directives={**DIRECTIVES, "linetrace": switch("DIRTYLOG_TRACE")},
            shared_utility_qualified_name=SHARED,
        )
        for module, with_c in zip(modules, translated, strict=True):
            module.sources = with_c.sources
        if process and process.wait():
            raise SystemExit(f"{' '.join(process.args)} ended with {process.returncode}")


os.chdir(HERE)
names = {".".join(pyx.with_suffix("").parts): str(pyx) for pyx in sorted(PACKAGE.rglob("*.pyx"))}
left_out = [] if LINUX else [name for name in names if name.startswith(NEEDS_LINUX)]
names = {name: pyx for name, pyx in names.items() if name not in left_out}
# From Python 3.14 on a pool of processes imports this file anew, while the build that waits for it holds the lock.
if __name__ != "__mp_main__":
    setup(
        cmdclass={"build_ext": BuildExtensions},
        ext_modules=[
            extension(SHARED, []),
            *(extension(name, [pyx, *C_SOURCES.get(name, [])]) for name, pyx in names.items()),
        ],
    )
