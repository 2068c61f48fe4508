"""Graph rewrites, one per file, and the manager that runs them."""
