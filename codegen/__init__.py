"""From a fused graph to a plan, kernels and packed weights."""
