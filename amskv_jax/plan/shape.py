"""The shape of a model's cache: all that plans, policies and memory reports need to know of it."""

from dataclasses import dataclass

from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class CacheShape:
    """What a model caches.

    Attributes:
      schedule: the token maps that are drawn.
      num_layers: blocks with self-attention.
      num_heads: attention heads per block.
      head_dim: channels per head.
    """

    schedule: ScaleSchedule
    num_layers: int
    num_heads: int
    head_dim: int
