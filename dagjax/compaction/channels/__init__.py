"""Which indices of which axes go together."""
