"""GPU kernels in Triton: a file per op with its kernels and their launcher; `entry` registers them.

An absolute `import triton` in this folder means the compiler, not this package.
"""
