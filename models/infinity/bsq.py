"""The multi-scale bitwise quantiser of Infinity: between a latent and its maps of bits.

A code is c bits, one for the sign of every channel; as a vector it is +-1 / sqrt(c), so that all
codes lie on the unit sphere (binary spherical quantisation, arXiv 2406.07548). There is no codebook
and nothing is learned. With patchify the latent has 2 x 2 positions per token; all interpolation
happens there, while codes have the transformer's layout, 4 c bits per token.
"""

from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from amskv_jax.errors import AmskvError
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.resize import resize
from amskv_jax.schedule import ScaleSchedule

Array = TypeVar("Array", jax.Array, np.ndarray)


@dataclass(frozen=True)
class BitwiseQuantizer:
    """The residual quantiser of Infinity's tokenizer (arXiv 2412.04431), float32 throughout.

    Scale i contributes up(codes): its codes as vectors, enlarged bilinearly to the last grid. B is
    the batch, h x w the last grid of the tokenizer, c its channels, K the bits of a token (c, or
    4 c with patchify), T_i and total the numbers of tokens.

    Attributes:
      config: shape of the tokenizer.
      schedule: the transformer's schedule.
    """

    config: BSQConfig
    schedule: ScaleSchedule

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        return self.config.latent_shape(self.schedule)

    def quantize(self, latent: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the codes of a latent, uint8 [B, total, K], and f_hat, which approximates it.

        Args:
          latent: [B, h, w, c] on the tokenizer's last grid.

        Raises:
          AmskvError: if the latent does not fit the schedule.
        """
        self._check("latent", latent.shape[1:], self.latent_shape)
        rest = latent.astype(jnp.float32)
        f_hat = jnp.zeros_like(rest)
        codes = []
        for scale, grid in enumerate(self._grids):
            # The reference brings vectors to unit length first, which changes no sign.
            bits = (resize(rest, grid, "area") > 0).astype(jnp.uint8)
            codes.append(self._to_tokens(bits))
            contribution = self._contribution(self.embed(codes[-1]), scale)
            f_hat, rest = f_hat + contribution, rest - contribution
        return jnp.concatenate(codes, axis=1), f_hat

    def tokens_to_latent(self, codes: jax.Array) -> jax.Array:
        """Return the latent f_hat [B, h, w, c] which codes [B, total, K] describe.

        Raises:
          AmskvError: if the codes are not those of the schedule.
        """
        f_hat = self._start(codes)
        for scale in range(self.schedule.num_scales):
            f_hat = self.accumulate(f_hat, self._entries(codes, scale), scale)
        return f_hat

    def teacher_inputs(self, codes: jax.Array) -> jax.Array:
        """Return the transformer's inputs at all scales but the first, [B, total - T_0, K].

        Args:
          codes: [B, total, K]; those of the last scale have no influence.

        Raises:
          AmskvError: if the codes are not those of the schedule.
        """
        f_hat = self._start(codes)
        inputs = [jnp.zeros((len(codes), 0, self.config.token_bits))]  # for a schedule of one scale
        for scale in range(self.schedule.num_scales - 1):
            f_hat = self.accumulate(f_hat, self._entries(codes, scale), scale)
            inputs.append(self.next_input(f_hat, scale))
        return jnp.concatenate(inputs, axis=1)

    def embed(self, codes: jax.Array) -> jax.Array:
        """Return the entries of codes [..., K], whose bits are 0 or 1: float32 [..., K]."""
        return self._value * (2 * codes.astype(jnp.float32) - 1)

    def embed_mixture(self, weights: jax.Array) -> jax.Array:
        """Return the mean entries [..., K] of bits with probabilities [..., K, 2] of 0 and 1."""
        weights = weights.astype(jnp.float32)
        return self._value * (weights[..., 1] - weights[..., 0])

    def accumulate(self, f_hat: jax.Array, entries: jax.Array, scale: int) -> jax.Array:
        """Return f_hat [B, h, w, c] with the contribution of ``scale`` added.

        Args:
          f_hat: sum of the earlier scales' contributions [B, h, w, c], zeros before the first.
          entries: embedded codes, or mixtures of them, [B, T_scale, K].
          scale: index of the scale.

        Raises:
          AmskvError: if ``entries`` is not a map of that scale.
        """
        return f_hat + self._contribution(entries, scale)

    def next_input(self, f_hat: jax.Array, scale: int) -> jax.Array:
        """Return f_hat [B, h, w, c] as input for the scale after ``scale``, [B, T_(scale+1), K].

        It is resized bilinearly, which skips positions where it shrinks: the models are trained so.
        """
        return self._to_tokens(resize(f_hat, self._grids[scale + 1], "bilinear"))

    @property
    def _value(self) -> float:
        """Absolute value of a code's channels."""
        return float(self.config.codebook_dim**-0.5)

    @property
    def _grids(self) -> tuple[tuple[int, int], ...]:
        return self.config.grids(self.schedule).grids

    def _start(self, codes: jax.Array) -> jax.Array:
        """Return an empty f_hat for codes, whose shape is checked."""
        expected = (self.schedule.total, self.config.token_bits)
        self._check("sequence of codes", codes.shape[1:], expected)
        return jnp.zeros((len(codes), *self.latent_shape))

    def _entries(self, codes: jax.Array, scale: int) -> jax.Array:
        return self.embed(codes[:, self.schedule.slice(scale)])

    def _contribution(self, entries: jax.Array, scale: int) -> jax.Array:
        """Return up(entries) [B, h, w, c] of the entries [B, T_scale, K] of one scale."""
        expected = (self.schedule.tokens[scale], self.config.token_bits)
        self._check(f"code map of scale {scale}", entries.shape[1:], expected)
        height, width = self.schedule.grids[scale]
        side = self.config.positions_per_side
        maps = unpatchify(entries.reshape(len(entries), height, width, -1), side)
        return resize(maps, self._grids[-1], "bilinear")

    def _to_tokens(self, maps: jax.Array) -> jax.Array:
        """Return maps [B, .., .., c] on the tokenizer's grid as tokens [B, T, K]."""
        tokens = patchify(maps, self.config.positions_per_side)
        return tokens.reshape(len(maps), -1, self.config.token_bits)

    def _check(self, what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise AmskvError(
                f"the {what} has shape {found} per picture, expected {expected} "
                f"for the schedule {self.schedule}: was it made with another schedule?"
            )


def patchify(maps: Array, side: int) -> Array:
    """Return maps [B, s h, s w, c] as [B, h, w, s s c], channel (c, dy, dx) (pixel_unshuffle)."""
    batch, height, width, channels = maps.shape
    split = maps.reshape(batch, height // side, side, width // side, side, channels)
    return split.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // side, width // side, -1)


def unpatchify(maps: Array, side: int) -> Array:
    """Return maps [B, h, w, s s c] as [B, s h, s w, c]: what `patchify` does, undone."""
    batch, height, width, _ = maps.shape
    split = maps.reshape(batch, height, width, -1, side, side)
    return split.transpose(0, 1, 4, 2, 5, 3).reshape(batch, side * height, side * width, -1)


def to_grids(codes: np.ndarray, config: BSQConfig, schedule: ScaleSchedule) -> np.ndarray:
    """Return codes of the transformer as they lie on the tokenizer's grids, as files hold them.

    Args:
      codes: [B, T_0 + ... + T_(n-1), K] of the first n scales.
      config: shape of the tokenizer.
      schedule: the transformer's schedule.

    Returns:
      [B, positions of the first n scales, c], of the same type; without patchify ``codes``.

    Raises:
      AmskvError: if these are not the codes of the first scales of the schedule.
    """
    scales = _first_scales(codes, schedule, config.token_bits, "the transformer's")
    maps = [
        codes[:, schedule.slice(scale)].reshape(len(codes), *schedule.grids[scale], -1)
        for scale in range(scales)
    ]
    positions = [unpatchify(x, config.positions_per_side) for x in maps]
    return np.concatenate(
        [x.reshape(len(codes), -1, config.codebook_dim) for x in positions], axis=1
    )


def from_grids(codes: np.ndarray, config: BSQConfig, schedule: ScaleSchedule) -> np.ndarray:
    """Return codes on the tokenizer's grids in the transformer's layout: `to_grids`, undone.

    Args:
      codes: [B, positions of the first n scales, c].
      config: shape of the tokenizer.
      schedule: the transformer's schedule.

    Returns:
      [B, T_0 + ... + T_(n-1), K], of the same type.

    Raises:
      AmskvError: if these are not the codes of the first scales of the schedule.
    """
    grids = config.grids(schedule)
    scales = _first_scales(codes, grids, config.codebook_dim, "the tokenizer's")
    maps = [
        codes[:, grids.slice(scale)].reshape(len(codes), *grids.grids[scale], -1)
        for scale in range(scales)
    ]
    tokens = [patchify(x, config.positions_per_side) for x in maps]
    return np.concatenate([x.reshape(len(codes), -1, config.token_bits) for x in tokens], axis=1)


def _first_scales(codes: np.ndarray, schedule: ScaleSchedule, bits: int, whose: str) -> int:
    """Return of how many scales codes are, at least one."""
    if codes.ndim == 3 and codes.shape[2] == bits and codes.shape[1] in schedule.offsets[1:]:
        return schedule.offsets.index(codes.shape[1])
    counts = ", ".join(map(str, schedule.offsets[1:]))
    raise AmskvError(
        f"the codes have shape {codes.shape}, expected [pictures, n, {bits}] where n is one of "
        f"{counts}, on {whose} grids {schedule}: were they made with another schedule or tokenizer?"
    )
