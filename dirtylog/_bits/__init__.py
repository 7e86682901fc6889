"""What DirtyBitmap is made of: blocks of words, sets of pages, and the vector kernels that work on them."""
