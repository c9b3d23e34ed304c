"""Benches: comparisons that one command repeats, ``python -m moe_core.bench NAME``. One file, one bench."""
