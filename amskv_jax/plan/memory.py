"""Memory arithmetic of key/value caches: plans against the two baselines, before any tracing."""

from dataclasses import dataclass, replace

from amskv_jax.numbers import NUMBERS, Numbers, Plain, numbers_of
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.rows import Row
from amskv_jax.plan.shape import CacheShape


@dataclass(frozen=True)
class CacheGeometry:
    """What a cached token costs.

    Attributes:
      rows: batch rows: one per picture, or two with guidance, which adds an unconditional one.
      num_heads: attention heads.
      head_dim: channels per head.
      numbers: how cached numbers are kept, where the plan does not say it.
    """

    rows: int
    num_heads: int
    head_dim: int
    numbers: Numbers = NUMBERS["bfloat16"]

    @classmethod
    def of(
        cls, shape: CacheShape, pictures: int, dtype: str, rows_per_picture: int = 2
    ) -> "CacheGeometry":
        """Return the geometry of a batch.

        Args:
          shape: of the model's cache.
          pictures: drawn at once.
          dtype: how cached numbers are kept, a name of ``numbers.NUMBERS``.
          rows_per_picture: 2 with guidance, 1 without; see ``guidance.Guidance``.
        """
        numbers = numbers_of(dtype)
        return cls(rows_per_picture * pictures, shape.num_heads, shape.head_dim, numbers)

    def bytes(self, head_slots: int, scores: int = 0) -> int:
        """Return the bytes of keys and values in ``head_slots`` slots of one head, all rows.

        Added are those of ``scores`` float32 numbers per row, see ``rows.SelectingRow.scores``.
        """
        return self.rows * (2 * head_slots * self.numbers.bytes(self.head_dim) + 4 * scores)

    def row_bytes(self, row: Row) -> int:
        """Return the bytes of one layer which keeps ``row``, each part in its own format."""
        total = 0
        for numbers, part in row.parts:
            own = self if numbers is None else replace(self, numbers=numbers_of(numbers))
            total += own.bytes(part.head_slots(self.num_heads), part.scores(self.num_heads))
        return total

    @property
    def plain(self) -> "CacheGeometry":
        """The same in floating-point numbers: as they are, or bfloat16 in place of codes."""
        if isinstance(self.numbers, Plain):
            return self
        return replace(self, numbers=NUMBERS["bfloat16"])

    def tokens(self, max_bytes: int) -> int:
        """Return how many tokens fit in ``max_bytes``, each in all heads of one layer, all rows."""
        return max_bytes // self.bytes(self.num_heads)


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a plan's cache and of what it is compared with.

    Attributes:
      plan: the buffers this package allocates for the plan.
      stored: that without the last scale, which no later step reads.
      full: all scales, keys and values in the cache's dtype, or bfloat16 where it or the plan's
        own formats hold codes.
      reference: the reference implementation's cache: all scales, float32 keys, half values.
    """

    plan: int
    stored: int
    full: int
    reference: int

    @classmethod
    def of(cls, plan: RetentionPlan, geometry: CacheGeometry) -> "MemoryReport":
        """Return the report of ``plan`` for a batch and model of ``geometry``."""
        heads, layers, total = geometry.num_heads, plan.num_layers, plan.schedule.total
        plain = geometry.plain
        if plan.states_formats:
            plain = replace(plain, numbers=NUMBERS["bfloat16"])
        everything = plain.bytes(heads * total * layers)
        return cls(
            plan=sum(map(geometry.row_bytes, plan.rows)),
            stored=plain.bytes(heads * (total - plan.schedule.tokens[-1]) * layers),
            full=everything,
            reference=plain.rows * heads * total * layers * plain.head_dim * (4 + 2),
        )

    def saving(self, baseline: int) -> float:
        """Return which share of ``baseline`` bytes the plan saves, 0 to 1."""
        return 1.0 - self.plan / baseline
