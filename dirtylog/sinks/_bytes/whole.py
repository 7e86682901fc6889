"""Checks the whole numbers that callers pass: of any kind, NumPy's too, and never True or False."""

from __future__ import annotations

import operator
from contextlib import suppress
from typing import Any, SupportsIndex

import numpy as np

__all__ = ["whole"]


def whole(value: SupportsIndex | Any, what: str, least: int, most: int | None = None, *, way_out: str = "") -> int:
    """Return a number as an int, which JSON writes as one.

    Parameters
    ----------
    value : int, or whatever has an index
        Of NumPy too. True and False are refused: JSON writes them as such, and no reader takes them for a number.
    what : str
        What errors call it.
    least, most : int
        Its bounds.
    way_out : str
        The end of the error's text.

    Raises
    ------
    ValueError
        It is not a whole number, or is out of bounds.

    Examples
    --------
    >>> whole(np.int64(3), "keep", 1)
    3
    """
    number = None
    if not isinstance(value, bool | np.bool_):
        with suppress(TypeError):
            number = operator.index(value)
    if number is None or number < least or (most is not None and number > most):
        raise ValueError(
            f"{what} is {value!r:.80}; it must be a number from {least}{'' if most is None else f' to {most}'}{way_out}"
        )
    return number
