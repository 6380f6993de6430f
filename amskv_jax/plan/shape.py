"""What memory reports and plans need to know of a model's shape."""

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


@dataclass(frozen=True)
class BlockShape:
    """How wide the blocks of a transformer are, and its head.

    Attributes:
      width: channels of the residual stream.
      hidden: channels between the two layers of the feed-forward part.
      choices: logits per token, over all its code axes.
      modulation: numbers per batch row which every block has of the condition, not counting what
        ``protocol.Model.held_bytes`` names.
      rotary: queries and keys are turned by their positions, in float32.
    """

    width: int
    hidden: int
    choices: int
    modulation: int = 0
    rotary: bool = False
