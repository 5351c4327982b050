"""Files, costs, sparse layers, and functions."""
