"""Looking at it: figures of an experiment, masks as pictures, drawings of a graph."""
