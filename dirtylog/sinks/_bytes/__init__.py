"""Dirty pages as bytes: cut into extents and windows, and moved between memory and files. What every sink stands on."""

from __future__ import annotations
