"""Cutting it out: channels, liveness, compaction; knows both graphs and masks."""
