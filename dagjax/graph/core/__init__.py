"""Graphs of functions and their level factors."""
