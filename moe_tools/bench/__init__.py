"""Benches: comparisons that one command repeats, ``python -m moe_tools.bench NAME``.

One file, one bench.
"""
