"""Cutting out what a mask has made dead."""
