"""Extension modules and build switches; all metadata is in pyproject.toml.

Environment switches, each off by default:

DIRTYLOG_SANITIZE  comma-separated list for -fsanitize=, for example "address,undefined" or "thread"
DIRTYLOG_DEBUG     1: no optimisation, C assertions on
DIRTYLOG_TRACE     1: Cython line tracing, for coverage of the .pyx files (slow)
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

HERE = Path(__file__).parent
PACKAGE = Path("dirtylog")
# Hand-written C that one module links, beside its own .pyx.
C_SOURCES = {
    "dirtylog.sources.process._remote": ["dirtylog/sources/process/_inject.c"],
    "dirtylog._bits.blocks": ["dirtylog/_bits/simd.c"],
    "dirtylog.sources.memory._tracking": [
        f"dirtylog/sources/memory/{name}.c"
        for name in ("_spans", "_registry", "_maps", "_uffd", "_faults", "_mprotect")
    ],
}


def switch(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def extension(pyx: Path, headers: list[str]) -> Extension:
    name = ".".join(pyx.with_suffix("").parts)
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
        compile_args += ["-O3"]
    if sanitizers:
        compile_args += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g"]
        link_args += [f"-fsanitize={sanitizers}"]
    if switch("DIRTYLOG_TRACE"):
        macros += [("CYTHON_TRACE_NOGIL", "1")]
    return Extension(
        name,
        sources=[str(pyx), *C_SOURCES.get(name, [])],
        include_dirs=["dirtylog/include", "dirtylog"],
        depends=headers,
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


os.chdir(HERE)
headers = sorted(str(path) for path in PACKAGE.rglob("*.h"))
setup(
    ext_modules=cythonize(
        [extension(pyx, headers) for pyx in sorted(PACKAGE.rglob("*.pyx"))],
        build_dir="build/cython",
        compiler_directives={"linetrace": switch("DIRTYLOG_TRACE"), "language_level": "3"},
    ),
    options={"build_ext": {"parallel": os.cpu_count() or 1}},
)
