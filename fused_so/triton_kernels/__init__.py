"""The ops whose GPU home is Triton: one file an op, each imported only when it is first launched.

Importing this package does not import Triton, so it is safe on a machine that has none.
"""
