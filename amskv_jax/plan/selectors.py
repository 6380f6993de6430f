"""Selectors: which of the tokens at hand a layer keeps, decided at run time per batch row and head.

How many tokens stay is static (``rows.SelectingRow``); a selector only ranks them.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from amskv_jax.errors import AmskvError, UsageError

Mode = Literal["paper", "reference"]

PROBABILITY_BYTES = 2**25
"""Most bytes of float32 attention probabilities that are held at once: what a large GPU's cache
holds, as they are read more than once."""


class Selector(Protocol):
    """Ranks tokens; a frozen, hashable dataclass whose fields are its options.

    Attributes:
      accumulates: whether it ranks by the attention that tokens receive of all queries, and carries
        a score per token from step to step, in the cache.
    """

    accumulates: ClassVar[bool]

    def check(self, grid: tuple[int, int], count: int) -> None:
        """Raise AmskvError if ``count`` tokens cannot be chosen after a map of size ``grid``."""
        ...

    def rank(
        self,
        query: jax.Array,
        key: jax.Array,
        scale: float,
        grid: tuple[int, int],
        mass: jax.Array | None,
        scores: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Rank all tokens at hand after one step.

        Args:
          query: of the step's own tokens, [rows, T, heads, head_dim].
          key: cached and own, [rows, S, heads, head_dim], the step's own being the last T.
          scale: factor of the attention logits.
          grid: (height, width) of the step's map; T is their product.
          mass: what ``attention_mass`` returns; None unless the selector accumulates.
          scores: of the cached tokens, [rows, heads, S - T]; None unless the selector accumulates.

        Returns:
          The rank of all S tokens [rows, heads, S] float32, the largest stay, and the scores to
          carry on, of the same shape (None unless the selector accumulates).
        """
        ...


@dataclass(frozen=True)
class WindowScores:
    """Keeps what a window of observing tokens attends to (ScaleKV, arXiv 2505.19602).

    The current map is cut into as many patches as the window has tokens; the token at the centre of
    each patch observes. Scores are max-pooled along the cache. The window itself always stays.

    Attributes:
      window: observing tokens, a square number.
      kernel: width of the max-pooling, odd; 1 is none.
      mode: "paper" scores by the attention probability that the window gives, with the queries and
        keys which the model itself attends with (equation 5). "reference" is compatible with the
        published code: plain dot products without softmax, summed over the window.

    Raises:
      UsageError: if an option is out of range.
    """

    accumulates: ClassVar[bool] = False
    window: int = 16
    kernel: int = 5
    mode: Mode = "paper"

    def __post_init__(self) -> None:
        if self.window < 1 or math.isqrt(self.window) ** 2 != self.window:
            raise UsageError(
                f"the window must be a square grid of tokens (1, 4, 9, 16, ...), not {self.window}"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"the pooling kernel must be odd and positive, not {self.kernel}")
        if self.mode not in get_args(Mode):
            raise UsageError(
                f"unknown mode {self.mode!r} of ScaleKV: expected {' or '.join(get_args(Mode))}"
            )

    def check(self, grid: tuple[int, int], count: int) -> None:
        """See ``Selector.check``."""
        side = math.isqrt(self.window)
        if side > min(grid):
            raise AmskvError(
                f"the window of {side}x{side} tokens does not fit the {grid[0]}x{grid[1]} map: "
                "take a smaller window or a larger budget"
            )
        if self.window > count:
            raise AmskvError(
                f"the window of {self.window} tokens exceeds the {count} that are kept: "
                "take a smaller window or a larger budget"
            )

    def positions(self, grid: tuple[int, int]) -> np.ndarray:
        """Return which tokens of a map observe, ascending.

        Where a side is no multiple of the window's, the rest at bottom or right is not observed.
        """
        side = math.isqrt(self.window)
        rows, columns = (
            np.arange(side) * (length // side) + (length // side - 1) // 2 for length in grid
        )
        return (rows[:, None] * grid[1] + columns).ravel()

    def rank(
        self,
        query: jax.Array,
        key: jax.Array,
        scale: float,
        grid: tuple[int, int],
        mass: jax.Array | None,
        scores: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        """See ``Selector.rank``; the window ranks at infinity."""
        positions = self.positions(grid)
        observing = query[:, positions]
        if self.mode == "paper":
            found = attention_mass(observing, key, scale)
        else:
            found = _logits(observing, key).sum(2) / math.sqrt(query.shape[-1])
        inside = np.zeros(key.shape[1], bool)
        inside[key.shape[1] - query.shape[1] + positions] = True
        pooled = lax.reduce_window(
            jnp.where(inside, -jnp.inf, found),
            -jnp.inf,
            lax.max,
            window_dimensions=(1, 1, self.kernel),
            window_strides=(1, 1, 1),
            padding="SAME",
        )
        return jnp.where(inside, jnp.inf, pooled), None


@dataclass(frozen=True)
class HeavyHitters:
    """Keeps what received most attention so far, and the latest tokens (H2O, arXiv 2306.14048).

    A token's score is the attention probability it received, summed over all queries since it
    entered the cache, those of its own map included.

    Attributes:
      recent: the latest tokens, which always stay.

    Raises:
      UsageError: if it is negative.
    """

    accumulates: ClassVar[bool] = True
    recent: int = 0

    def __post_init__(self) -> None:
        if self.recent < 0:
            raise UsageError(f"the recent tokens must be 0 or more, not {self.recent}")

    def check(self, grid: tuple[int, int], count: int) -> None:
        """See ``Selector.check``."""
        if self.recent > count:
            raise AmskvError(
                f"{self.recent} recent tokens exceed the {count} that are kept: "
                "take fewer of them or a larger budget"
            )

    def rank(
        self,
        query: jax.Array,
        key: jax.Array,
        scale: float,
        grid: tuple[int, int],
        mass: jax.Array | None,
        scores: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """See ``Selector.rank``; recent tokens rank at infinity."""
        assert mass is not None, "it ranks by the attention of all queries"
        found = mass
        if scores is not None:
            found += jnp.pad(scores, ((0, 0), (0, 0), (0, query.shape[1])))
        recent = np.arange(key.shape[1]) >= key.shape[1] - self.recent
        return jnp.where(recent, jnp.inf, found), found


SELECTORS: dict[str, type[WindowScores] | type[HeavyHitters]] = {
    "window_scores": WindowScores,
    "heavy_hitters": HeavyHitters,
}
"""Name in plan files -> selector."""


def best(rank: jax.Array, count: int) -> jax.Array:
    """Return which ``count`` tokens rank highest, ascending; of equal ones the earlier stay.

    Args:
      rank: [rows, heads, S].
      count: at most S.

    Returns:
      Indices [rows, heads, count] int32.
    """
    return jnp.sort(lax.top_k(rank, count)[1], axis=-1)


def attention_mass(
    query: jax.Array,
    key: jax.Array,
    scale: float,
    limit: int = PROBABILITY_BYTES,
) -> jax.Array:
    """Return the attention probability that every key receives, summed over the queries.

    A second pass over the logits, in parts of the batch, or of a row's queries if that is not
    enough: all probabilities are never held together.

    Args:
      query: [rows, T, heads, head_dim].
      key: [rows, S, heads, head_dim].
      scale: factor of the logits.
      limit: most bytes of float32 probabilities held at once (but at least one query's).

    Returns:
      [rows, heads, S] float32.
    """
    _, length, heads, _ = query.shape
    most = max(1, limit // (heads * key.shape[1] * 4))  # queries at once

    def mass(queries: jax.Array, keys: jax.Array) -> jax.Array:
        logits = scale * _logits(queries, keys)
        return jnp.exp(logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)).sum(-2)

    def of_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, keys = row
        if most >= length:
            return mass(queries, keys)
        whole = length // most * most
        parts = queries[:whole].reshape(-1, most, *queries.shape[1:])
        total, _ = lax.scan(
            lambda total, part: (total + mass(part, keys), None),
            jnp.zeros((heads, len(keys)), jnp.float32),
            parts,
        )
        return total + mass(queries[whole:], keys) if whole < length else total

    # Parts of equal size, or the rest would be a program of its own.
    most_rows, rows = max(1, most // length), len(query)
    size = max(part for part in range(1, min(most_rows, rows) + 1) if rows % part == 0)
    return lax.map(of_row, (query, key), batch_size=size)


def _logits(query: jax.Array, key: jax.Array) -> jax.Array:
    """Return all dot products [..., heads, T, S] float32 of [..., T or S, heads, head_dim]."""
    precision = lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    return jnp.einsum(
        "...tnh,...snh->...nts", query, key, precision=precision, preferred_element_type=jnp.float32
    )
