"""Kernels: one folder per op, each with a readable oracle beside the fast versions."""
