"""Configuration of the transformer: frozen, hashable, a static argument of ``jit``."""

from dataclasses import dataclass

from amskv_jax.models.infinity.schedules import SQUARE_1M
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class InfinityConfig:
    """Shape of an Infinity transformer (arXiv 2412.04431).

    Attributes:
      depth: number of blocks.
      width: channels of the residual stream, D.
      num_heads: attention heads; they share ``width`` equally.
      bits: bits of a token, each of which has a logit for 0 and one for 1. Four times those of the
        tokenizer where it folds patches of 2 x 2 into a token (8B).
      schedule: the token maps that are drawn unless others are asked for; no weight depends on it.
      text_channels: channels of the text features.
      text_maxlen: longest text, in tokens.
      num_levels: rows of the scale embedding.
      mlp_ratio: hidden width of the feed-forward part over ``width``, before rounding.
      block_chunks: groups in which the reference keeps its blocks; names in its files tell it.

    Raises:
      ValueError: if the numbers do not fit together.
    """

    depth: int
    width: int
    num_heads: int
    bits: int = 32
    schedule: ScaleSchedule = SQUARE_1M
    text_channels: int = 2048
    text_maxlen: int = 512
    num_levels: int = 15
    mlp_ratio: float = 4.0
    block_chunks: int = 1

    def __post_init__(self) -> None:
        for number, what in ((self.num_heads, "heads"), (self.pooling_heads, "pooling heads")):
            if self.width % number:
                raise ValueError(f"width {self.width} is not a multiple of {number} {what}")
        if self.head_dim % 4:
            raise ValueError(
                f"heads of {self.head_dim} channels cannot turn with rows and columns: "
                "expected a multiple of 4"
            )
        if self.depth % self.block_chunks:
            raise ValueError(f"depth {self.depth} is not a multiple of {self.block_chunks} chunks")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward part, a multiple of 256."""
        return round(self.width * self.mlp_ratio / 256) * 256

    @property
    def pooling_heads(self) -> int:
        """Heads of the attention which pools the text."""
        return max(1, self.text_channels // (64 if self.width > 4096 else 128))
