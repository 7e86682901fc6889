"""setuptools' build backend, which asks for Cython only where something is to be compiled.

To unpack Cython takes as long as everything else that an installation does when all modules have been compiled already.
"""

from __future__ import annotations

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# After setuptools, which brings it.
from distutils.core import run_setup  # isort: skip

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

CYTHON = "cython>=3.3,<3.4"


def get_requires_for_build_sdist(config_settings: object = None) -> list[str]:
    """Return what is needed to pack the sources; what setuptools finds in a .pyx depends on Cython."""
    return [CYTHON]


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    """Return what is needed to build: nothing, if what there is of an earlier build is of these sources."""
    built = run_setup("setup.py", stop_after="init").get_command_obj("build_ext").is_up_to_date()
    return [] if built else [CYTHON]


get_requires_for_build_editable = get_requires_for_build_wheel
