"""What dirty pages are used for: one file a sink."""
