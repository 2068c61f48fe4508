"""The C dialect: kernels for CPUs, compiled by the system's compiler or by the one of the ``ziglang`` package."""
