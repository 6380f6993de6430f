"""Kernels which stay stacked over layers: products read theirs where it lies."""

from amskv_jax.stacked.int8 import Int8Weight, int8_weight
from amskv_jax.stacked.weight import StackedWeight, in_place, layer_of

__all__ = ["Int8Weight", "StackedWeight", "in_place", "int8_weight", "layer_of"]
