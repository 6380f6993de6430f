"""Attention. Generation needs no masks: exact sizes decide what is visible."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from amskv_jax.errors import UsageError
from amskv_jax.precision import precision_of

Implementation = Literal["auto", "cudnn", "xla"]

QKV = tuple[jax.Array, jax.Array, jax.Array]
Attention = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""Maps queries, keys and values [rows, T, heads, head_dim] to the output and a carry."""

LOGITS_BYTES, CPU_LOGITS_BYTES = 2**30, 2**22
"""Most bytes of float32 logits the XLA back end holds at once; more are computed in turn. On CPUs,
logits that stay in their caches are three times as fast."""


def choose_implementation(
    implementation: Implementation, dtype: jax.typing.DTypeLike, head_dim: int
) -> Literal["cudnn", "xla"]:
    """Return the back end that ``attend`` uses on the default device.

    "auto" is cuDNN's flash attention on NVIDIA GPUs that have it (compute capability 8.0, half
    precision, heads of at most 128 channels in steps of 8), and exact XLA everywhere else.

    Raises:
      UsageError: if the name is unknown.
    """
    if implementation in ("cudnn", "xla"):
        return implementation
    if implementation != "auto":
        raise UsageError(f"unknown attention {implementation!r}: expected auto, cudnn or xla")
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "0")
    capable = (
        device.platform == "gpu"
        and capability.replace(".", "").isdigit()
        and float(capability) >= 8.0
    )
    return "cudnn" if capable and has_flash(dtype, head_dim) else "xla"


def has_flash(dtype: jax.typing.DTypeLike, head_dim: int) -> bool:
    """Return whether cuDNN's flash attention takes such numbers and heads."""
    return jnp.dtype(dtype).itemsize == 2 and head_dim <= 128 and head_dim % 8 == 0


def logits_bytes() -> int:
    """Return the most bytes of logits that the XLA back end holds at once on this machine."""
    return CPU_LOGITS_BYTES if jax.default_backend() == "cpu" else LOGITS_BYTES


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: float,
    implementation: Implementation = "auto",
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Return softmax(scale * query key^T) value, all queries of a row seeing all its keys.

    Args:
      query: [rows, T, heads, head_dim].
      key: [rows, S, heads, head_dim].
      value: like ``key``.
      scale: factor of the logits.
      implementation: the back end, see ``choose_implementation``; fixed when the call is traced.
      lengths: how many keys every row has, [rows] int32 from 1 to S; what comes after them is
        padding, which must be finite. None for S.

    Returns:
      [rows, T, heads, head_dim] in the query's dtype. The softmax is computed in float32.
    """
    if choose_implementation(implementation, query.dtype, query.shape[-1]) == "cudnn":
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=scale,
            implementation="cudnn",
            key_value_seq_lengths=lengths,
        )
    queries = logits_bytes() // (query.shape[2] * key.shape[1] * 4)
    if queries >= query.shape[0] * query.shape[1]:
        return _exact(query, key, value, scale, lengths)

    def attend_row(row: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        query, key, value, length = row
        if queries >= len(query):
            return _exact(query, key, value, scale, length)
        return lax.map(
            lambda own: _exact(own[None], key, value, scale, length)[0],
            query,
            batch_size=max(queries, 1),
        )

    batch_size = max(queries // query.shape[1], 1)
    return lax.map(attend_row, (query, key, value, lengths), batch_size=batch_size)


def attend_block_causal(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: float,
    ends: tuple[int, ...],
    implementation: Implementation = "auto",
) -> jax.Array:
    """Attend in blocks which see themselves and all earlier ones, as ``attend``; differentiable.

    XLA attends block by block, to exactly what is visible. cuDNN has no gradient for odd sizes, so
    it gets all at once with a mask; where even the whole is odd, XLA takes its place.

    Args:
      query: [rows, T, heads, head_dim].
      key: like ``query``.
      value: like ``query``.
      scale: factor of the logits.
      ends: where every block ends, ascending, the last at T.
      implementation: the back end, see ``choose_implementation``.
    """
    chosen = choose_implementation(implementation, query.dtype, query.shape[-1])
    if chosen == "cudnn" and ends[-1] % 2 == 0:
        blocks = np.searchsorted(ends, np.arange(ends[-1]), side="right")
        mask = jnp.asarray(blocks[:, None] >= blocks)[None, None]
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, implementation="cudnn"
        )
    parts = [
        attend(query[:, start:stop], key[:, :stop], value[:, :stop], scale, "xla")
        for start, stop in pairwise((0, *ends))
    ]
    return jnp.concatenate(parts, axis=1)


def _exact(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: float,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Attend with all logits at once, for one row or several."""
    precision = precision_of(query.dtype)
    query, key, value = (jnp.swapaxes(x, -2, -3) for x in (query, key, value))
    logits = jnp.einsum(
        "...td,...sd->...ts",
        query,
        key,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    logits = scale * logits
    if lengths is not None:
        positions = jnp.arange(key.shape[-2])[*[None] * (logits.ndim - 1)]
        is_key = positions < lengths[..., None, None, None]
        logits = jnp.where(is_key, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    output = jnp.einsum("...ts,...sd->...td", weights, value, precision=precision)
    return jnp.swapaxes(output, -2, -3)
