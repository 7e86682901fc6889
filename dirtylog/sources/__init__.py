"""Where dirty pages come from: one file, or one folder with a face, for each source."""
