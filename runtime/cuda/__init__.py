"""NVIDIA GPUs as a device, through the driver's interface (``cuda.bindings.driver``), without torch and Triton.

The package is imported when a GPU is asked for, and ``driver.py`` alone names the bindings, which are an extra.
"""
