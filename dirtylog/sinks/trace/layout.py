"""The layout of a trace file: its columns, its header, its limits, and how it fails."""

from __future__ import annotations

from typing import Any

from dirtylog.errors import BackendUnavailable, DirtyLogError

__all__ = [
    "COLUMNS",
    "FORMAT_VERSION",
    "MAX_METADATA_BYTES",
    "MAX_TRACE_PAGES",
    "METADATA_KEY",
    "ROWS_AT_ONCE",
    "TraceError",
    "parquet_module",
]

FORMAT_VERSION = 1
METADATA_KEY = b"dirtylog"
COLUMNS = {"time": "double", "epoch": "int64", "first": "int64", "count": "int64", "exact": "bool"}

# What one row group or one epoch may hold in memory while a trace is read: 2**20 runs are 33 MiB.
ROWS_AT_ONCE = 1 << 20
# A page space of 2**32 pages (16 TiB) has bitmaps of 512 MiB; a file from elsewhere may not ask for more.
MAX_TRACE_PAGES = 1 << 32
MAX_METADATA_BYTES = 1 << 20


class TraceError(DirtyLogError):
    """A trace file that is damaged, of another version, or no trace."""


def parquet_module() -> Any:
    """Return pyarrow's Parquet module, or say how to get it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise BackendUnavailable("Parquet", f"import pyarrow: {error}", "pip install pyarrow") from error
    return pyarrow.parquet
