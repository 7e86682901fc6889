"""Fuzzing of everything that parses bytes from elsewhere: ``python -m fuzz TARGET --seconds N``."""
