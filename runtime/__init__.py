"""The runtime: loads an artifact directory and runs it, without torch."""
