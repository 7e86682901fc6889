"""What needs no Python, in C: the geometry of a harvest, the vector paths, and deltas of live memory."""

from pathlib import Path

HERE = Path(__file__).parent


def test_a_range_is_made_of_lines_and_of_the_pages_left_and_right_of_them(c_program):
    assert c_program(HERE / "harvest_parts.c") == (0, "")


def test_every_vector_path_does_what_the_scalar_one_does(c_program):
    assert c_program(HERE / "kernels.c", "_bits/simd.c") == (0, "")


def test_a_harvest_to_page_numbers_leaves_dirty_what_finds_no_room(c_program):
    assert c_program(HERE / "harvest_pages.c", "_bits/simd.c") == (0, "")


def test_a_delta_of_memory_that_is_written_meanwhile_is_one_that_the_other_end_takes(c_program):
    assert c_program(HERE / "live_delta.c") == (0, "")
