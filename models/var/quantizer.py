"""The multi-scale residual quantiser of VAR's tokenizer: between a latent and its token maps."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from amskv_jax.errors import AmskvError
from amskv_jax.models.layers import per_channel
from amskv_jax.models.module import Module
from amskv_jax.models.var.config import VQVAEConfig
from amskv_jax.resize import resize


def phi_indices(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """Return which of the ``num_phi`` shared convolutions every scale uses.

    Scales lie evenly on [0, 1] and take the nearest of as many evenly spaced ticks. Some scales are
    equally far from two ticks, so the choice follows from float64 rounding: ten scales and four
    convolutions give 0, 0, 1, 1, 1, 2, 2, 3, 3, 3.
    """
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    last = max(num_scales - 1, 1)
    return tuple(int(np.argmin(np.abs(ticks - scale / last))) for scale in range(num_scales))


def _codebook_init(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-1 / shape[0], maxval=1 / shape[0])


class MultiScaleQuantizer(Module):
    """Codebook and phi convolutions; a latent is the sum of what its token maps contribute.

    Scale i contributes phi(up(codes)): its codebook vectors, enlarged to the last grid, then
    phi(h) = (1 - r) h + r conv(h). Tokens feed back into the transformer, so everything here is
    float32 at the highest precision, whatever the rest of the model computes in.

    Everything but the choice of tokens is differentiable. Algorithms 1 and 2 of arXiv 2404.02905.

    Attributes:
      config: shape of the tokenizer.
    """

    config: VQVAEConfig

    def setup(self) -> None:
        """Declare the parameters."""
        config = self.config
        channels = config.latent_channels
        small = nn.initializers.variance_scaling(
            0.1, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=(0,)
        )
        self.codebook = self.param("codebook", _codebook_init, (config.vocab_size, channels))
        self.phi_kernel = self.param(
            "phi_kernel", small, (config.num_phi, 3, 3, channels, channels)
        )
        self.phi_bias = self.param(
            "phi_bias", nn.initializers.zeros_init(), (config.num_phi, channels)
        )

    def quantize(self, latent: jax.Array, every_scale: bool = False) -> tuple[jax.Array, jax.Array]:
        """Return the tokens of a latent, int32 [B, total], and f_hat, which approximates it.

        Args:
          latent: [B, h, w, C] on the schedule's last grid.
          every_scale: give f_hat after every scale, [S, B, h, w, C], instead of [B, h, w, C].

        Raises:
          AmskvError: if the latent does not fit the schedule.
        """
        self._check("latent", latent.shape[1:], self._latent_shape)
        rest = latent.astype(jnp.float32)
        f_hat = jnp.zeros_like(rest)
        tokens, stages = [], []
        for scale, grid in enumerate(self.config.schedule.grids):
            vectors = resize(rest, grid, "area")
            tokens.append(self._nearest(vectors.reshape(len(latent), -1, vectors.shape[-1])))
            contribution = self._contribution(self.embed(tokens[-1]), scale)
            f_hat, rest = f_hat + contribution, rest - contribution
            if every_scale:
                stages.append(f_hat)
        return jnp.concatenate(tokens, axis=1), jnp.stack(stages) if every_scale else f_hat

    def tokens_to_latent(self, tokens: jax.Array, every_scale: bool = False) -> jax.Array:
        """Return the latent f_hat which tokens describe.

        Args:
          tokens: int32 [B, total].
          every_scale: give f_hat after every scale, [S, B, h, w, C], instead of [B, h, w, C].

        Raises:
          AmskvError: if the number of tokens is not that of the schedule.
        """
        f_hat, codes = self._start(tokens)
        stages = []
        for scale in range(self.config.schedule.num_scales):
            f_hat = self.accumulate(f_hat, codes[:, self.config.schedule.slice(scale)], scale)
            if every_scale:
                stages.append(f_hat)
        return jnp.stack(stages) if every_scale else f_hat

    def teacher_inputs(self, tokens: jax.Array) -> jax.Array:
        """Return the transformer's inputs at all scales but the first, [B, total - T_0, C].

        Args:
          tokens: int32 [B, total]; those of the last scale have no influence.

        Raises:
          AmskvError: if the number of tokens is not that of the schedule.
        """
        f_hat, codes = self._start(tokens)
        inputs = [codes[:, :0]]  # so that a schedule of one scale gives an empty sequence
        for scale in range(self.config.schedule.num_scales - 1):
            f_hat = self.accumulate(f_hat, codes[:, self.config.schedule.slice(scale)], scale)
            inputs.append(self.next_input(f_hat, scale))
        return jnp.concatenate(inputs, axis=1)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Return the codebook vectors of tokens [...], float32 [..., C]."""
        return jnp.take(self.codebook.astype(jnp.float32), tokens, axis=0)

    def embed_mixture(self, weights: jax.Array) -> jax.Array:
        """Return mixtures of all codebook vectors, float32 [..., C], of weights [..., V]."""
        codebook = self.codebook.astype(jnp.float32)
        return jnp.matmul(weights, codebook, precision=lax.Precision.HIGHEST)

    def accumulate(self, f_hat: jax.Array, codes: jax.Array, scale: int) -> jax.Array:
        """Return f_hat [B, h, w, C] with the contribution of ``scale`` added.

        Args:
          f_hat: sum of the earlier scales' contributions [B, h, w, C], zeros before the first.
          codes: codebook vectors, or mixtures of them, [B, T_scale, C].
          scale: index of the scale.

        Raises:
          AmskvError: if ``codes`` is not a map of that scale.
        """
        return f_hat + self._contribution(codes, scale)

    def next_input(self, f_hat: jax.Array, scale: int) -> jax.Array:
        """Return f_hat [B, h, w, C] as input for the scale after ``scale``, [B, T_(scale+1), C]."""
        smaller = resize(f_hat, self.config.schedule.grids[scale + 1], "area")
        return smaller.reshape(len(smaller), -1, smaller.shape[-1])

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        return (*self.config.schedule.grids[-1], self.config.latent_channels)

    def _start(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return an empty f_hat and the codebook vectors of all tokens."""
        self._check("sequence of tokens", tokens.shape[1:], (self.config.schedule.total,))
        return jnp.zeros((len(tokens), *self._latent_shape)), self.embed(tokens)

    def _nearest(self, vectors: jax.Array) -> jax.Array:
        """Return the index of the codebook vector nearest to each of ``vectors`` [..., C]."""
        codebook = self.codebook.astype(jnp.float32)
        products = jnp.einsum("...c,vc->...v", vectors, codebook, precision=lax.Precision.HIGHEST)
        squares = jnp.sum(vectors**2, -1, keepdims=True)
        squares = squares + per_channel(jnp.sum(codebook**2, -1), products)
        return jnp.argmin(squares - 2 * products, axis=-1).astype(jnp.int32)

    def _contribution(self, codes: jax.Array, scale: int) -> jax.Array:
        """Return phi(up(codes)) [B, h, w, C] for the codes [B, T_scale, C] of one scale."""
        config = self.config
        grid, channels = config.schedule.grids[scale], config.latent_channels
        self._check(f"code map of scale {scale}", codes.shape[1:], (grid[0] * grid[1], channels))
        maps = codes.reshape(len(codes), *grid, channels)
        h = resize(maps, config.schedule.grids[-1], "bicubic")
        index = phi_indices(config.schedule.num_scales, config.num_phi)[scale]
        convolved = lax.conv_general_dilated(
            h,
            self.phi_kernel[index].astype(jnp.float32),
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )
        convolved += per_channel(self.phi_bias[index].astype(jnp.float32), convolved)
        return (1 - config.phi_ratio) * h + config.phi_ratio * convolved

    def _check(self, what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise AmskvError(
                f"the {what} has shape {found} per picture, expected {expected} "
                f"for the schedule {self.config.schedule}: was it made with another schedule?"
            )
