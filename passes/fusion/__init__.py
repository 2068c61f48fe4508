"""Grouping a graph into kernels: which operators may share one, and the dependency graph that keeps it legal."""
