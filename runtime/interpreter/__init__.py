"""The interpreter device: GPU kernels run on the CPU by Triton's interpreter, in a process of their own.

It is for checking kernels without a GPU, not for speed. ``process`` is the parent's side, ``worker`` the other.
"""
