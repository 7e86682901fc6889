"""Dirty pages as a strip: how dense they are from the first page to the last, as a small SVG image."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dirtylog._bits.ranges import pages_before

if TYPE_CHECKING:
    from typing import Protocol

    from dirtylog._bits.pages import DirtyPages

    class HasRuns(Protocol):
        """Pages of a page space."""

        @property
        def npages(self) -> int: ...
        def runs(self) -> npt.NDArray[np.int64]: ...


__all__ = ["density", "strip_html", "strip_svg"]


def density(pages: HasRuns, buckets: int) -> npt.NDArray[np.float64]:
    """Return which share of its pages is dirty in each of some equal parts of the page space.

    Parameters
    ----------
    pages : DirtyPages, or what has their `npages` and `runs`
        What to look at.
    buckets : int
        How many parts; no more are made than there are pages.

    Returns
    -------
    array of float64, shape (min(buckets, pages.npages),)
        From 0 to 1.

    Raises
    ------
    ValueError
        `buckets` is less than 1.

    Notes
    -----
    O(runs + buckets).

    Examples
    --------
    >>> import dirtylog as dl
    >>> density(dl.DirtyPages.from_runs([[0, 10], [30, 5]], 40), 4).tolist()
    [1.0, 0.0, 0.0, 0.5]
    """
    if buckets < 1:
        raise ValueError(f"buckets is {buckets}; it must be 1 or more")
    buckets = min(buckets, pages.npages)
    if not buckets:
        return np.zeros(0)
    edges = np.arange(buckets + 1) * pages.npages // buckets
    runs = pages.runs()
    if not len(runs):
        return np.zeros(buckets)
    shares: npt.NDArray[np.float64] = np.diff(pages_before(runs, edges)) / np.diff(edges)
    return shares


def strip_svg(pages: DirtyPages, buckets: int = 256, width: int = 640, height: int = 24) -> str:
    """Draw the density as a strip.

    Parameters
    ----------
    pages : DirtyPages
        What to draw.
    buckets : int, default 256
        Columns of the strip.
    width, height : int
        In pixels.

    Returns
    -------
    str
        An SVG element that refers to nothing outside of itself. One dirty page can be seen in any number of clean ones.
    """
    shares = density(pages, buckets)
    columns = "".join(
        f'<rect x="{i}" width="1" height="1" fill="#c2410c" fill-opacity="{0.2 + 0.8 * shares[i]:.3f}"/>'
        for i in np.flatnonzero(shares).tolist()
    )
    title = escape(f"{pages.count} of {pages.npages} pages are dirty")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}" height="{height}" '
        f'viewBox="0 0 {max(len(shares), 1)} 1" preserveAspectRatio="none" shape-rendering="crispEdges">'
        f'<title>{title}</title><rect width="100%" height="100%" fill="#e7e5e4"/>{columns}</svg>'
    )


def strip_html(pages: DirtyPages) -> str:
    """Return the strip with a line of text below it, for a notebook.

    Examples
    --------
    >>> import dirtylog as dl
    >>> strip_html(dl.DirtyPages.from_indices([1], 8))[-62:]
    '<div>1 of 8 pages of 4096 bytes are dirty (12.5 %)</div></div>'
    """
    share = 100 * pages.count / pages.npages if pages.npages else 0.0
    inexact = "" if pages.exact else "; inexact: the source lost track"
    text = f"{pages.count} of {pages.npages} pages of {pages.page_size} bytes are dirty ({share:.3g} %){inexact}"
    return f"<div>{strip_svg(pages)}<div>{escape(text)}</div></div>"
