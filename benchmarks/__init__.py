"""How fast dirtylog is, by ratio: ``python -m benchmarks``; ``benchmarks.peers`` compares it with its peers."""
