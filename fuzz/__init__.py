"""Fuzzing of everything that parses bytes from elsewhere: ``python -m fuzz TARGET --seconds N``."""

__all__ = ["NAMES"]

# Known before anything of dirtylog is imported, which atheris instruments; `fuzz.examine` has what is behind each.
NAMES = (
    "words",
    "pickle",
    "shared",
    "ring",
    "footer",
    "snapshot",
    "trace",
    "migration",
    "postcopy",
    "answers",
    "nbd",
    "qmp",
    "vhost",
)
