"""Infinity's tokenizer: an autoencoder whose latent is a sum of maps of bits of growing size."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from amskv_jax.errors import AmskvError
from amskv_jax.models.convolutions import Decoder, Encoder
from amskv_jax.models.infinity.bsq import BitwiseQuantizer
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.parts import Built, module_of
from amskv_jax.schedule import ScaleSchedule

STRIP_BYTES = 2**26
"""Above it a map of the decoder is worked on in strips: 64 MiB, reached at 512 pixels."""


class BSQVAE(nn.Module):
    """Multi-scale bitwise tokenizer of Infinity (arXiv 2412.04431), channels last.

    Call a step with ``module.apply({"params": params}, ..., method="decode")``. Below, B is the
    batch, h x w the tokenizer's last grid (twice the schedule's with patchify), c its channels, K
    the bits of a token (c, or 4 c with patchify), T_i and total the numbers of tokens of the
    schedule, and f_hat the latent as the codes so far describe it.

    Attributes:
      config: shape of the model.
      schedule: the transformer's schedule; weights fit any.
      dtype: in which encoder and decoder compute, float32 or bfloat16. The quantiser is always
        float32.
      strip_bytes: maps of the decoder which take more bytes per picture go through its layers in
        strips of rows of at most that size, None for never. The numbers are the same, as norms keep
        the statistics of whole maps; at 1024 pixels it saves a third of the memory in float32. What
        remains are four maps of the highest resolution, with ``config.channels`` channels.
    """

    config: BSQConfig
    schedule: ScaleSchedule
    dtype: DTypeLike = jnp.float32
    strip_bytes: int | None = STRIP_BYTES

    def setup(self) -> None:
        """Declare the parts."""
        config = self.config
        blocks = config.num_res_blocks
        common: dict[str, Any] = {
            "channels": config.channels,
            "multipliers": config.channel_multipliers,
            "attention": False,
            "dtype": self.dtype,
        }
        self.encoder = Encoder(num_blocks=blocks, features=config.codebook_dim, **common)
        self.decoder = Decoder(num_blocks=blocks + 1, strip_bytes=self.strip_bytes, **common)

    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Return what encoding, quantising and decoding make of pictures [B, H, W, 3]."""
        _, f_hat = self.quantize(self.encode_features(pictures))
        return self.decode(f_hat)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the largest activation while one picture is decoded."""
        config = self.config
        height, width = config.picture_size(self.schedule)
        channels = config.channels * max(config.channel_multipliers[:2])  # just enlarged
        return height * width * channels * jnp.dtype(self.dtype).itemsize

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        return self.config.latent_shape(self.schedule)

    @property
    def quantizer(self) -> BitwiseQuantizer:
        """The quantiser, which has no weights."""
        return BitwiseQuantizer(self.config, self.schedule)

    def encode_features(self, pictures: jax.Array) -> jax.Array:
        """Return the latent [B, h, w, c], float32, of pictures [B, H, W, 3] in [-1, 1].

        Raises:
          AmskvError: if the pictures have another size than the schedule needs.
        """
        expected = (*self.config.picture_size(self.schedule), 3)
        if pictures.shape[1:] != expected:
            raise AmskvError(
                f"pictures have shape {pictures.shape[1:]}, expected (height, width, channels) = "
                f"{expected} for the schedule {self.schedule}: resize or crop them"
            )
        return self.encoder(pictures).astype(jnp.float32)

    def encode(self, pictures: jax.Array) -> jax.Array:
        """Return the codes, uint8 [B, total, K], of pictures; see ``encode_features``."""
        return self.quantize(self.encode_features(pictures))[0]

    def decode(self, f_hat: jax.Array) -> jax.Array:
        """Return the pictures [B, H, W, 3], float32 in [-1, 1], of latents f_hat [B, h, w, c]."""
        return jnp.clip(self.decoder(f_hat).astype(jnp.float32), -1, 1)

    def quantize(self, latent: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return codes uint8 [B, total, K] and f_hat; see `BitwiseQuantizer.quantize`."""
        return self.quantizer.quantize(latent)

    def tokens_to_latent(self, codes: jax.Array) -> jax.Array:
        """Return f_hat of codes; see `BitwiseQuantizer.tokens_to_latent`."""
        return self.quantizer.tokens_to_latent(codes)

    def teacher_inputs(self, codes: jax.Array) -> jax.Array:
        """Return the transformer's inputs [B, total - T_0, K] for codes [B, total, K]."""
        return self.quantizer.teacher_inputs(codes)

    def embed(self, codes: jax.Array) -> jax.Array:
        """Return the entries [..., K] of codes [..., K]."""
        return self.quantizer.embed(codes)

    def embed_mixture(self, weights: jax.Array) -> jax.Array:
        """Return the entries [..., K] of mixtures of both values, weights [..., K, 2]."""
        return self.quantizer.embed_mixture(weights)

    def accumulate(self, f_hat: jax.Array, entries: jax.Array, scale: int) -> jax.Array:
        """Return f_hat with the entries [B, T_scale, K] of ``scale`` added to it."""
        return self.quantizer.accumulate(f_hat, entries, scale)

    def next_input(self, f_hat: jax.Array, scale: int) -> jax.Array:
        """Return the transformer's input [B, T_(scale+1), K] after ``scale``."""
        return self.quantizer.next_input(f_hat, scale)


@module_of.register
def _(config: BSQConfig) -> Built:
    schedule = ScaleSchedule.square((1, 2))  # the weights fit any
    picture = jax.ShapeDtypeStruct((1, *config.picture_size(schedule), 3), jnp.float32)
    return BSQVAE(config, schedule), (picture,)
