"""What is computed: graphs of functions, their level factors, rewrites, a zoo."""
