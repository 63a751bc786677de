"""Benchmarks of fused_so, and the programs that use it end to end."""
