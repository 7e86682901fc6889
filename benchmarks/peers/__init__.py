"""dirtylog against its peers, each doing the same work side by side in one run."""
