"""Constrained solvers: plain functions on tensors and callables."""
