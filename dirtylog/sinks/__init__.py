"""What dirty pages are used for: one file, or one folder with a face, for each sink."""
