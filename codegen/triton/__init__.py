"""Triton for GPUs: kernel text, its compilation ahead of time, and the binaries of an artifact."""
