"""What a next-scale model is to the rest of the package.

The loop of ``generate`` knows a model by these protocols alone. The condition is opaque to it: a
pytree whose leaves have a leading axis of B pictures, which only the model understands.

Names of dimensions: B pictures; rows = B, or 2 B with guidance (see ``guidance.Guidance``); T_i
tokens of scale i; D width; ``*K`` the code axes of a token, () in VAR, (bits,) in Infinity; V
choices per code; h x w x C the latent.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from flax import struct

from amskv_jax.attention import Attention
from amskv_jax.models.guidance import Controls, Drawing, Guidance
from amskv_jax.plan.shape import BlockShape, CacheShape
from amskv_jax.schedule import ScaleSchedule


@struct.dataclass
class Prepared:
    """What stays the same while one call draws.

    Attributes:
      start: input of the first scale, [rows, T_0, D] float32.
      layers: leaves [depth, ...]: block weights, and what the condition makes of them per layer.
      shared: what every block and the head see besides.
    """

    start: jax.Array
    layers: Any
    shared: Any


class Transformer(Protocol):
    """A transformer bound to its weights and to the schedule that is drawn."""

    @property
    def attention_scale(self) -> float:
        """Factor of the attention logits."""
        ...

    def prepare(self, condition: Any, guidance: Guidance) -> Prepared:
        """Return everything that depends on the condition of B pictures alone."""
        ...

    def block(
        self, layer: Any, shared: Any, x: jax.Array, step: int, attention: Attention
    ) -> tuple[jax.Array, Any]:
        """Map the residual stream [rows, T, D] to the next one and the carry of ``attention``.

        It comes and goes in the type of products, and is summed in float32.
        ``layer`` is ``Prepared.layers`` at one layer; ``step`` is static.
        """
        ...

    def some_rows(self, layer: Any, shared: Any, take: Callable[[Any], Any]) -> tuple[Any, Any]:
        """Return ``layer`` and ``shared``, as ``block`` takes them, of some batch rows alone.

        Args:
          layer: of all rows.
          shared: of all rows; ``logits`` takes what comes of it too.
          take: returns these rows of a tree of arrays [rows, ...].
        """
        ...

    def next_input(self, features: jax.Array, step: int) -> jax.Array:
        """Return the input [B, T_step, D] float32 of a later scale, from ``Tokenizer.next_input``.

        Args:
          features: [B, T_step, C'].
          step: the scale that is about to be drawn.
        """
        ...

    def logits(self, x: jax.Array, shared: Any) -> jax.Array:
        """Return logits [rows, T, *K, V] float32 of the last block's output [rows, T, D]."""
        ...


class Tokenizer(Protocol):
    """A tokenizer bound to its weights and to the schedule that is drawn."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C)."""
        ...

    @property
    def activation_bytes(self) -> int:
        """Bytes of the largest activation while one picture is decoded."""
        ...

    def encode(self, pictures: jax.Array) -> jax.Array:
        """Return the codes [B, total, *K], integers, of pictures [B, H, W, 3] in [-1, 1].

        Raises:
          AmskvError: if the pictures have another size than the schedule needs.
        """
        ...

    def embed(self, codes: jax.Array) -> jax.Array:
        """Return float32 entries [B, T, C'] of codes [B, T, *K]."""
        ...

    def embed_mixture(self, weights: jax.Array) -> jax.Array:
        """Return entries [B, T, C'] of mixtures of all choices, weights [B, T, *K, V] float32."""
        ...

    def accumulate(self, latent: jax.Array, entries: jax.Array, step: int) -> jax.Array:
        """Return the latent [B, h, w, C] float32 with the entries of scale ``step`` added."""
        ...

    def next_input(self, latent: jax.Array, step: int) -> jax.Array:
        """Return what the transformer gets to draw scale ``step + 1``, [B, T_(step+1), C']."""
        ...

    def decode(self, latent: jax.Array) -> jax.Array:
        """Return pictures [B, H, W, 3] float32 in [-1, 1]."""
        ...


class Conditions(Protocol):
    """Numbered things to draw."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def batch(self, numbers: np.ndarray) -> Any:
        """Return the condition of the pictures with these numbers [B], as host arrays.

        Its shapes depend on B and the whole, not on which numbers they are, so that all batches of
        one size are served by one compiled program.
        """
        ...

    def classes(self, numbers: np.ndarray) -> np.ndarray | None:
        """Return the classes of pictures with these numbers, [B] int32; None if they have none."""
        ...

    def captions(self, classes: Sequence[str]) -> Sequence[str]:
        """Return a short text for every one, for people.

        Args:
          classes: names of the model's classes, where its checkpoint says them.
        """
        ...


class Model(Protocol):
    """A kind of model in all its shapes; frozen, hashable, no arrays.

    Attributes:
      kind: its name in checkpoints.
      takes: what it draws, as a user says it: "classes", "prompts".
      drawing: how it is drawn from unless a checkpoint or a user says otherwise.
    """

    kind: ClassVar[str]
    takes: ClassVar[str]
    drawing: ClassVar[Drawing]

    @property
    def parts(self) -> Mapping[str, Any]:
        """Return the configuration of every part that has weights, by the part's name."""
        ...

    @property
    def schedule(self) -> ScaleSchedule:
        """The schedule that is drawn unless another is asked for."""
        ...

    def check_schedule(self, schedule: ScaleSchedule) -> None:
        """Raise AmskvError, listing the nearest, if the model cannot draw this schedule."""
        ...

    def find_schedule(self, aspect: str | None, size: str | None) -> ScaleSchedule:
        """Return the schedule of an aspect ratio and a size, as people name them.

        Raises:
          UsageError: if there is none, listing what there is.
        """
        ...

    def cache_shape(self, schedule: ScaleSchedule) -> CacheShape:
        """Return what is cached."""
        ...

    @property
    def block_shape(self) -> BlockShape:
        """How wide blocks and head are."""
        ...

    def picture_size(self, schedule: ScaleSchedule) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        ...

    def bind(
        self, params: Mapping[str, Any], schedule: ScaleSchedule, dtype: str
    ) -> tuple[Transformer, Tokenizer]:
        """Return the two halves with their weights.

        Args:
          params: a tree per part; only the parts that a caller uses need be there.
          schedule: what is drawn.
          dtype: "float32" or "bfloat16", of products and cache.
        """
        ...

    def conditions(self, wanted: Any) -> Conditions:
        """Return what a user asks for as conditions; None stands for an example of each.

        Raises:
          UsageError: if it cannot be drawn.
        """
        ...

    def forced(self, codes: np.ndarray, schedule: ScaleSchedule) -> np.ndarray:
        """Return codes of the first scales as ``Controls.forced`` takes them.

        Args:
          codes: [B, tokens, *K] on the tokenizer's own grids.
          schedule: what is drawn.

        Raises:
          AmskvError: if they are not those of the first scales.
        """
        ...

    def held_bytes(self, rows: int, condition: Any | None, dtype: str) -> Mapping[str, int]:
        """Return the bytes of what is large besides weights and cache, by what it is.

        Args:
          rows: of the batch, see ``Guidance``.
          condition: of the batch; None for the largest there can be.
          dtype: of the products.
        """
        ...

    def guidance(self, drawing: Drawing) -> Guidance:
        """Return where guidance acts: nowhere if the strength is none at every scale.

        Raises:
          UsageError: if a block does not exist.
        """
        ...

    def controls(self, schedule: ScaleSchedule, drawing: Drawing) -> Controls:
        """Return strength and temperature of every scale, nothing forced.

        Raises:
          UsageError: if there are too many or too few numbers, or one is out of range.
        """
        ...
