"""Sub-networks, paths, interactions."""
