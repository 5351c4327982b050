"""A network at a point."""
