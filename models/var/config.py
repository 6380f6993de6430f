"""Configurations of the models: frozen, hashable, so they serve as static arguments of ``jit``."""

from dataclasses import dataclass

from amskv_jax.plan.shape import CacheShape
from amskv_jax.schedule import VAR_256, ScaleSchedule


@dataclass(frozen=True)
class VARConfig:
    """Shape of a class-conditional VAR transformer (arXiv 2404.02905).

    Attributes:
      depth: number of blocks.
      width: channels of the residual stream, D.
      num_heads: attention heads; they share ``width`` equally.
      schedule: the token maps it generates.
      num_classes: classes; index ``num_classes`` is the unconditional one.
      vocab_size: entries of the tokenizer's codebook, V.
      latent_channels: channels of a codebook entry.
      mlp_ratio: hidden width of the feed-forward part over ``width``.
      attn_l2_norm: queries and keys have unit length, with a learned temperature per head.
      shared_aln: one adaptive-norm projection for all blocks, plus a learned offset per block.
    """

    depth: int
    width: int
    num_heads: int
    schedule: ScaleSchedule = VAR_256
    num_classes: int = 1000
    vocab_size: int = 4096
    latent_channels: int = 32
    mlp_ratio: float = 4.0
    attn_l2_norm: bool = True
    shared_aln: bool = False

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.num_heads} heads")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    @property
    def cache_shape(self) -> CacheShape:
        """Shape of the cache: what plans, policies and memory reports know of the model."""
        return CacheShape(self.schedule, self.depth, self.num_heads, self.head_dim)

    @property
    def attention_scale(self) -> float:
        """Factor of the attention logits, besides the learned temperature of ``attn_l2_norm``."""
        return 1.0 if self.attn_l2_norm else 0.25 / self.head_dim**0.5


@dataclass(frozen=True)
class VQVAEConfig:
    """Shape of the multi-scale residual VQVAE which turns pictures into VAR's token maps.

    Attributes:
      schedule: the token maps; the last one is the latent's grid.
      vocab_size: entries of the codebook, V.
      latent_channels: channels of the latent and of a codebook entry.
      channels: channels of the first level (``ch`` of the reference).
      channel_multipliers: channels of each level over ``channels``; every level but the last
        halves the resolution.
      num_res_blocks: residual blocks per encoder level; the decoder has one more.
      num_phi: convolutions phi shared among the scales (``share_quant_resi``).
      phi_ratio: share of the convolution in phi(h) = (1 - r) h + r conv(h).
    """

    schedule: ScaleSchedule = VAR_256
    vocab_size: int = 4096
    latent_channels: int = 32
    channels: int = 160
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    num_phi: int = 4
    phi_ratio: float = 0.5

    @property
    def downsampling(self) -> int:
        """Picture side over latent side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width) of the pictures, in pixels."""
        height, width = self.schedule.grids[-1]
        return height * self.downsampling, width * self.downsampling
