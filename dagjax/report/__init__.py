"""Looking at it: figures of an experiment and drawings of a graph."""
