"""Fuzzers: random kernels' operands, graphs and models, each against a definition in fp64.

``pytest tests/fuzz`` gives each a few examples, always the same ones. ``pytest tests/fuzz -n 0
--fuzz-minutes 10`` gives each ten minutes, from a new seed (or ``--fuzz-seed``), and prints seeds
and counts.
"""
