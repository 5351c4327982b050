"""What JAX wrote: programs, primitives, and their interpretation."""
