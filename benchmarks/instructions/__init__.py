"""Instruction counts of the hot paths: they do not drift as times do."""
