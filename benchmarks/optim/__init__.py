"""Searches and constrained solvers against what else is at hand: ``python -m trimtab.benchmarks.optim.NAME``.

``python -m trimtab.benchmarks.optim.table`` prints one table of what they wrote.
"""
