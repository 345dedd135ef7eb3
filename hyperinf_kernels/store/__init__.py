"""Gradients on disk: readers of other libraries' stores, and a writer of bergson's.

Every reader yields (ids, {block: (B, ...)}) for `solver.update`, and needs torch and numpy only.
"""
