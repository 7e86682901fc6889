"""Arithmetic on runs of pages: what it costs follows how many runs there are, not how many pages."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["count_ranges", "pages_before", "union"]

Name = TypeVar("Name", bound=Hashable)


def pages_before(runs: npt.NDArray[np.int64], edges: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count the pages of some runs that come before each edge.

    Parameters
    ----------
    runs : array of int64, shape (n, 2)
        First page and count, ascending, none overlapping.
    edges : array of int64
        Page numbers, in any order.

    Returns
    -------
    array of int64
        As long as `edges`.

    Notes
    -----
    O(runs + edges log runs).
    """
    if not len(runs):
        return np.zeros(len(edges), np.int64)
    # Those of the runs that begin before the edge, less what the last of them has behind it.
    first, count = runs.T
    before = np.concatenate([[0], np.cumsum(count)])
    run = np.searchsorted(first, edges)
    last = np.maximum(run - 1, 0)
    behind = np.where(run > 0, np.maximum(first[last] + count[last] - edges, 0), 0)
    found: npt.NDArray[np.int64] = before[run] - behind
    return found


def count_ranges(runs: npt.NDArray[np.int64], among: Mapping[Name, tuple[int, int]]) -> dict[Name, int]:
    """Count the pages of some runs in each of several ranges.

    Parameters
    ----------
    runs : array of int64, shape (n, 2)
        First page and count, ascending, none overlapping.
    among : mapping
        By name, (first, count) of pages.

    Returns
    -------
    dict
        By name, in the order of `among`.
    """
    edges = np.array([(first, first + count) for first, count in among.values()], np.int64).reshape(-1)
    low, high = pages_before(runs, edges).reshape(-1, 2).T
    return dict(zip(among, (high - low).tolist(), strict=True))


def union(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Unite two arrays of runs, each ascending and without overlaps; so is the result, and no run touches the next.

    Parameters
    ----------
    a, b : array of int64, shape (n, 2)
        First page and count.

    Returns
    -------
    array of int64, shape (n, 2)
        First page and count; O(runs log runs).
    """
    both = np.concatenate([a, b])
    both = both[both[:, 1] > 0]
    if not len(both):
        return both
    both = both[np.argsort(both[:, 0], kind="stable")]
    first = both[:, 0]
    end = np.maximum.accumulate(both.sum(axis=1))
    begins = np.flatnonzero(np.append(True, first[1:] > end[:-1]))
    ends = end[np.append(begins[1:], len(both)) - 1]
    return np.stack([first[begins], ends - first[begins]], axis=1)
