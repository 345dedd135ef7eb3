"""Adapters: our solvers inside other attribution libraries, one file per library.

Nothing here is imported by the package itself; `from hyperinf_kernels.integrations import dattri`
imports dattri, and says in one line what to install where it is missing. `conventions` knows how
every host writes scores, damping and losses, `layout` how a flat gradient is cut into blocks.
"""
