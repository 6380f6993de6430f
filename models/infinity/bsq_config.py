"""Configuration of Infinity's tokenizer: frozen, hashable."""

from dataclasses import dataclass

from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class BSQConfig:
    """Shape of the multi-scale bitwise tokenizer of Infinity (arXiv 2412.04431).

    The published ones have 16, 18, 20, 24, 32 or 64 channels and pixels of 16 per token, or 14
    channels, pixels of 8 per latent position, and four of those positions to a token.

    Attributes:
      codebook_dim: channels of the latent, c; each is one bit of a code.
      channels: channels of the first level (``base_ch`` of the reference).
      channel_multipliers: channels of each level over ``channels``; every level but the last
        halves the resolution, so the patch size is 16 with five levels and 8 with four.
      num_res_blocks: residual blocks per encoder level; the decoder has one more.
      patchify: a token of the transformer stands for 2 x 2 positions of the latent, whose grids
        have twice the height and width of the schedule's (``apply_spatial_patchify``).
    """

    codebook_dim: int = 32
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    num_res_blocks: int = 2
    patchify: bool = False

    def __post_init__(self) -> None:
        if self.codebook_dim < 1:
            raise ValueError(f"codebook_dim is {self.codebook_dim}, expected at least 1")
        for multiplier in self.channel_multipliers:
            if self.channels * multiplier % 32:
                raise ValueError(
                    f"a level of {self.channels} x {multiplier} channels cannot be normalised in "
                    "32 groups"
                )

    @property
    def token_bits(self) -> int:
        """Bits of one token of the transformer."""
        return self.codebook_dim * self.positions_per_side**2

    @property
    def positions_per_side(self) -> int:
        """Positions of the latent along each side of a token: 2 with patchify, else 1."""
        return 2 if self.patchify else 1

    @property
    def downsampling(self) -> int:
        """Picture side over latent side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def grids(self, schedule: ScaleSchedule) -> ScaleSchedule:
        """Return the tokenizer's own grids for a schedule of the transformer."""
        side = self.positions_per_side
        return ScaleSchedule(tuple((side * h, side * w) for h, w in schedule.grids))

    def latent_shape(self, schedule: ScaleSchedule) -> tuple[int, int, int]:
        """Return (h, w, c) of the latent."""
        return (*self.grids(schedule).grids[-1], self.codebook_dim)

    def picture_size(self, schedule: ScaleSchedule) -> tuple[int, int]:
        """Return (height, width) of the pictures, in pixels."""
        height, width, _ = self.latent_shape(schedule)
        return height * self.downsampling, width * self.downsampling
