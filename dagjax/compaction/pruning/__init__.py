"""Which units to keep."""
