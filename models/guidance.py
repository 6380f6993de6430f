"""Classifier-free guidance: where it acts, in which order its rows lie, and how strong it is."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from amskv_jax.errors import UsageError
from amskv_jax.schedule import ScaleSchedule

PerScale = float | tuple[float, ...]
"""One number for all scales, or one for each."""


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn, as people say it; a model makes ``Guidance`` and ``Controls`` of it.

    Attributes:
      cfg: strength of classifier-free guidance, in the model's own convention. VAR: 0 is none, one
        number is that of the last scale, growing from 0 at the first. Infinity: 1 is none, one
        number holds at all scales.
      tau: temperature of the logits.
      guide: where guidance acts: 0 on the logits, -n at the output of the n-th block from the end
        (the reference's ``cfg_insertion_layer``).
      top_k: keep the k largest logits; 0 keeps all, 1 is greedy.
      top_p: after top-k, drop the least likely choices up to 1 - top_p in total; 0 keeps all.
      more_smooth: feed back mixtures of entries (smoother; not for evaluation).
    """

    cfg: PerScale = 1.5
    tau: PerScale = 1.0
    guide: tuple[int, ...] = (0,)
    top_k: int = 900
    top_p: float = 0.96
    more_smooth: bool = False


def per_scale(numbers: PerScale, schedule: ScaleSchedule, what: str) -> np.ndarray:
    """Return one finite float32 per scale, [S].

    Raises:
      UsageError: if there are neither one nor S numbers, or one is not finite; ``what`` names them.
    """
    array = np.asarray(numbers, np.float32).reshape(-1)
    if len(array) not in (1, schedule.num_scales):
        raise UsageError(
            f"{what} has {len(array)} numbers: expected one, or one for each of the "
            f"{schedule.num_scales} scales"
        )
    if not np.isfinite(array).all():
        wrong = next(number for number in array if not math.isfinite(number))
        raise UsageError(f"{what} must be finite, not {wrong}")
    return np.broadcast_to(array, schedule.num_scales)


@dataclass(frozen=True)
class Guidance:
    """Where guidance acts; static under ``jit``, and the only place that knows the order of rows.

    With guidance every picture has two rows, one with its condition and one without, next to each
    other (c0, u0, c1, u1, ...), so that both lie on one device of a mesh. Without, it has one row:
    half the products, half the cache.

    Attributes:
      on_logits: the two rows' logits are mixed.
      on_layers: blocks whose output is mixed, both rows going on with the mixture (Infinity, arXiv
        2412.04431); ascending.
    """

    on_logits: bool = True
    on_layers: tuple[int, ...] = ()

    @classmethod
    def at(cls, guide: tuple[int, ...], num_layers: int) -> "Guidance":
        """Return guidance at the places that ``Drawing.guide`` names.

        Raises:
          UsageError: if there is none, or no such block, or one which comes before the blocks.
        """
        for place in guide:
            if not -num_layers < place <= 0:
                raise UsageError(
                    f"guidance cannot act at {place}: expected 0 (on the logits), or -n for the "
                    f"output of the n-th block from the end, -1 to -{num_layers - 1}"
                )
        if not guide:
            raise UsageError("guidance acts nowhere: name a place, or set its strength to none")
        layers = sorted({num_layers + place for place in guide if place})
        return cls(0 in guide, tuple(layers))

    @property
    def paired(self) -> bool:
        """Whether a picture has two rows."""
        return self.on_logits or bool(self.on_layers)

    @property
    def rows_per_picture(self) -> int:
        """Batch rows of one picture."""
        return 2 if self.paired else 1

    def pair(self, conditional: jax.Array, unconditional: jax.Array) -> jax.Array:
        """Return the rows [rows, ...] of B pictures from their two halves [B, ...]."""
        if not self.paired:
            return conditional
        stacked = jnp.stack([conditional, unconditional], axis=1)
        return stacked.reshape(-1, *conditional.shape[1:])

    def repeat(self, x: jax.Array) -> jax.Array:
        """Return the rows [rows, ...] of pictures [B, ...] whose rows are equal."""
        return self.pair(x, x)

    def mix_logits(self, logits: jax.Array, strength: jax.Array) -> jax.Array:
        """Return the guided logits g c + (1 - g) u of every picture.

        Args:
          logits: [rows, ...].
          strength: g, float32 scalar; 1 leaves the conditional row.

        Returns:
          [B, ...]; without guidance on logits those of the conditional rows.
        """
        if not self.paired:
            return logits
        conditional, unconditional = _halves(logits)
        if not self.on_logits:
            return conditional
        return _extrapolate(conditional, unconditional, strength)

    def mix_rows(self, x: jax.Array, strength: jax.Array, mixes: jax.Array) -> jax.Array:
        """Return rows [rows, ...] of which both of a picture are g c + (1 - g) u.

        Args:
          x: a block's output, [rows, ...].
          strength: g, float32 scalar; at 1 both rows stay what they are.
          mixes: whether this block mixes at all, bool scalar.
        """
        conditional, unconditional = _halves(x)
        mixed = self.repeat(_extrapolate(conditional, unconditional, strength))
        return jnp.where(mixes & (strength != 1), mixed.astype(x.dtype), x)

    def layer_flags(self, num_layers: int) -> np.ndarray:
        """Return which blocks mix, [num_layers] bool."""
        return np.isin(np.arange(num_layers), self.on_layers)


UNGUIDED = Guidance(on_logits=False)
"""One row per picture."""


@struct.dataclass
class Controls:
    """What may change from call to call without compiling again.

    Attributes:
      strength: of guidance at every scale, [S] float32; 1 is none.
      temperature: by which logits are divided, [S] float32.
      forced: codes which take the place of the drawn ones, [B, T_0 + ... + T_(n-1), *K] for the
        first n scales; None for none.
    """

    strength: jax.Array
    temperature: jax.Array
    forced: jax.Array | None = None


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def _extrapolate(
    conditional: jax.Array, unconditional: jax.Array, strength: jax.Array
) -> jax.Array:
    """Return g c + (1 - g) u, rounded in the same way wherever the compiler computes it.

    What is drawn depends on comparing logits with sorted ones. A compiler may compute them once for
    each, and fuse one product with the sum or the other, which rounds differently: the largest
    would then be below itself. Integers between products and sum keep it from fusing them.
    """
    zero = jnp.isnan(strength).astype(jnp.int32)  # which the compiler does not know

    def rounded(product: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(product.astype(jnp.float32), jnp.int32)
        return lax.bitcast_convert_type(bits + zero, jnp.float32)

    # As the references compute it, (1 + s) c - s u.
    return rounded(strength * conditional) - rounded((strength - 1) * unconditional)
