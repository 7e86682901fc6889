"""Compile and import the yardsticks in C."""

import functools
import importlib.util
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import dirtylog as dl
from dirtylog._core import simd_paths


@functools.cache
def yardsticks() -> ModuleType:
    """Return the compiled module; it lives in a temporary directory until the program ends."""
    directory = Path(tempfile.mkdtemp(prefix="dirtylog-yardsticks-"))
    target = directory / f"yardsticks{sysconfig.get_config_var('EXT_SUFFIX')}"
    compiler = sysconfig.get_config_var("CC").split()[0]
    vector = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vbmi2", "-mpopcnt"] if "avx512" in simd_paths() else []
    subprocess.run(
        [
            compiler,
            "-O2",
            "-shared",
            "-fPIC",
            "-std=gnu11",
            *vector,
            f"-I{sysconfig.get_paths()['include']}",
            f"-I{dl.get_include()}",
            str(Path(__file__).with_name("native.c")),
            "-o",
            str(target),
        ],
        check=True,
    )
    spec = importlib.util.spec_from_file_location("yardsticks", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
