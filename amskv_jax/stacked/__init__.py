"""Kernels which stay stacked over layers: products read theirs where it lies."""

from amskv_jax.stacked.weight import StackedWeight, in_place, layer_of

__all__ = ["StackedWeight", "in_place", "layer_of"]
