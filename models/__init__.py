"""Model definitions in plain PyTorch: a registry by name."""
