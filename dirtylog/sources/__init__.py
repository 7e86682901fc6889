"""Where dirty pages come from: one file a source."""
