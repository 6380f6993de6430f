"""VAR's tokenizer: a VQVAE whose latent is a sum of token maps of growing size."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from amskv_jax.errors import AmskvError
from amskv_jax.models.convolutions import Decoder, Encoder, convolution
from amskv_jax.models.parts import Built, module_of
from amskv_jax.models.var.config import VQVAEConfig
from amskv_jax.models.var.quantizer import MultiScaleQuantizer


class VQVAE(nn.Module):
    """Multi-scale residual VQVAE (arXiv 2404.02905), pictures and latents channels last.

    Call a step with ``module.apply({"params": params}, ..., method="decode")``. Below, B is the
    batch, h x w the schedule's last grid, C the latent channels, S the number of scales, T_i and
    total the numbers of tokens, and f_hat the latent as the tokens so far describe it.

    Attributes:
      config: shape of the model.
      dtype: in which encoder and decoder compute, float32 or bfloat16. The quantiser and the
        convolution before it are always float32.
    """

    config: VQVAEConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Declare the parts."""
        config = self.config
        channels = config.latent_channels
        common: dict[str, Any] = {
            "channels": config.channels,
            "multipliers": config.channel_multipliers,
            "attention": True,
            "dtype": self.dtype,
        }
        self.encoder = Encoder(num_blocks=config.num_res_blocks, features=channels, **common)
        self.decoder = Decoder(num_blocks=config.num_res_blocks + 1, **common)
        self.quantizer = MultiScaleQuantizer(self.config)
        self.quant_conv = convolution(channels, 3, jnp.float32)
        self.post_quant_conv = convolution(channels, 3, self.dtype)

    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Return what encoding, quantising and decoding make of pictures [B, H, W, 3]."""
        _, f_hat = self.quantize(self.encode_features(pictures))
        return self.decode(f_hat)

    def encode_features(self, pictures: jax.Array) -> jax.Array:
        """Return the latent [B, h, w, C], float32, of pictures [B, H, W, 3] in [-1, 1].

        Raises:
          AmskvError: if the pictures have another size than the schedule needs.
        """
        expected = (*self.config.picture_size, 3)
        if pictures.shape[1:] != expected:
            raise AmskvError(
                f"pictures have shape {pictures.shape[1:]}, expected (height, width, channels) = "
                f"{expected} for the schedule {self.config.schedule}: resize or crop them"
            )
        return self.quant_conv(self.encoder(pictures))

    def encode(self, pictures: jax.Array) -> jax.Array:
        """Return the tokens, int32 [B, total], of pictures; see ``encode_features``."""
        return self.quantize(self.encode_features(pictures))[0]

    def decode(self, f_hat: jax.Array) -> jax.Array:
        """Return the pictures [B, H, W, 3], float32 in [-1, 1], of latents f_hat [B, h, w, C]."""
        pictures = self.decoder(self.post_quant_conv(f_hat))
        return jnp.clip(pictures.astype(jnp.float32), -1, 1)

    def quantize(self, latent: jax.Array, every_scale: bool = False) -> tuple[jax.Array, jax.Array]:
        """Return tokens int32 [B, total] and f_hat; see `MultiScaleQuantizer.quantize`."""
        return self.quantizer.quantize(latent, every_scale)

    def tokens_to_latent(self, tokens: jax.Array, every_scale: bool = False) -> jax.Array:
        """Return f_hat of tokens; see `MultiScaleQuantizer.tokens_to_latent`."""
        return self.quantizer.tokens_to_latent(tokens, every_scale)

    def teacher_inputs(self, tokens: jax.Array) -> jax.Array:
        """Return the transformer's inputs [B, total - T_0, C] for tokens [B, total]."""
        return self.quantizer.teacher_inputs(tokens)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of a latent."""
        return (*self.config.schedule.grids[-1], self.config.latent_channels)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the largest activation while one picture is decoded."""
        height, width = self.config.picture_size
        return height * width * self.config.channels * jnp.dtype(self.dtype).itemsize

    def embed_mixture(self, weights: jax.Array) -> jax.Array:
        """Return mixtures of all codebook vectors [..., C], weights [..., V] float32."""
        return self.quantizer.embed_mixture(weights)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Return the codebook vectors [..., C] of tokens [...]."""
        return self.quantizer.embed(tokens)

    def accumulate(self, f_hat: jax.Array, codes: jax.Array, scale: int) -> jax.Array:
        """Return f_hat with the codes [B, T_scale, C] of ``scale`` added to it."""
        return self.quantizer.accumulate(f_hat, codes, scale)

    def next_input(self, f_hat: jax.Array, scale: int) -> jax.Array:
        """Return the transformer's input [B, T_(scale+1), C] after ``scale``."""
        return self.quantizer.next_input(f_hat, scale)


@module_of.register
def _(config: VQVAEConfig) -> Built:
    return VQVAE(config), (jax.ShapeDtypeStruct((1, *config.picture_size, 3), jnp.float32),)
