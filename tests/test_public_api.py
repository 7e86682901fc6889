"""The public names: those of the documentation, each there, documented and typed."""

import inspect
import subprocess
import sys

import pytest

import dirtylog as dl


@pytest.mark.parametrize("name", sorted(dl.__all__))
def test_every_public_name_can_be_reached_and_says_what_it_is(name):
    value = getattr(dl, name)
    assert inspect.getdoc(value), f"dirtylog.{name} has no docstring"
    assert name in dir(dl)


@pytest.mark.parametrize("name", ["DirtyBitmap", "DirtyPages"])
def test_every_public_method_says_what_it_does(name):
    for attribute, value in vars(getattr(dl, name)).items():
        if callable(value) and not attribute.startswith("_"):
            assert inspect.getdoc(value), f"dirtylog.{name}.{attribute} has no docstring"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = dl.nonsense


def test_the_bits_alone_load_neither_the_model_nor_the_sources():
    code = "import sys, dirtylog; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    costly = ("dirtylog.vm", "dirtylog.sources", "dirtylog.sinks", "dirtylog.log", "rich", "argparse")
    assert not [name for name in done.stdout.split() if name.startswith(costly)]
