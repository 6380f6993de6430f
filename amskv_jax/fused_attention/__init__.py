"""Attention to the cache where it lies: a kernel for Hopper GPUs."""
