"""What is kept: masks, scores, selections, pruners. Knows trees, not graphs."""
