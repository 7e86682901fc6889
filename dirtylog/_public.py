"""Says of a public name the module it is public in, whatever file it is written in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["publish"]


def publish(module: str, namespace: Mapping[str, Any], names: Iterable[str]) -> None:
    """Make classes and functions name `module` as theirs: in tracebacks, in ``help()`` and in pickles.

    Parameters
    ----------
    module : str
        The module that people import the names from. A pickle names it, so that it can be loaded after the file
        that defines the class has moved.
    namespace : mapping
        Where the names are looked up: ``globals()`` of the module that publishes them.
    names : iterable of str
        What to publish. Values that have no ``__module__`` of their own (constants) are left alone.
    """
    for name in names:
        value = namespace[name]
        if isinstance(value, type) or callable(value):
            value.__module__ = module
