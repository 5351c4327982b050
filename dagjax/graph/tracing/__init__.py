"""A JAX function taken apart: flatten its program, choose nodes, cut arcs."""
