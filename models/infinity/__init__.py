"""Infinity: text-to-image next-scale models with bitwise tokens (arXiv 2412.04431)."""
