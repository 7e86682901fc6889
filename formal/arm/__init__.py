"""Litmus tests of the headers for 64-bit Arm: the compiler's code, against the architecture's memory model."""
