"""Attention. Generation needs no masks: exact sizes decide what is visible."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from amskv_jax.errors import UsageError
from amskv_jax.fused_attention.blocks import WIDTH, Spans
from amskv_jax.hopper import has_mosaic
from amskv_jax.precision import precision_of

Implementation = Literal["auto", "mosaic", "cudnn", "xla"]
Chosen = Literal["mosaic", "cudnn", "xla"]

LEAST_WORK = 2**26
"""Pairs of a query and a key, of all heads and rows, from which the kernel of "mosaic" is used. It
is faster for fewer, but every size is a program of its own, which takes a second or two to compile
and most of one to trace."""

LOGITS_BYTES, CPU_LOGITS_BYTES = 2**30, 2**22
"""Most bytes of float32 logits the XLA back end holds at once; more are computed in turn. On CPUs,
logits that stay in their caches are three times as fast."""


class Product(NamedTuple):
    """What a step's queries and values come from, which the kernel of "mosaic" reads where it lies.

    Attributes:
      heads: [rows, T, 3 * heads, head_dim], vectors of all queries, of all keys, and all values.
      temperature: of every head, [heads] float32, if a query is its vector at unit length times
        this; None if it is something else.
    """

    heads: jax.Array
    temperature: jax.Array | None


class QKV(NamedTuple):
    """Queries, keys and values of a step's own tokens.

    Attributes:
      query: [rows, T, heads, head_dim].
      key: likewise.
      value: likewise.
      product: what they come from, where that is known. Of queries and values in both forms, the
        one which is not used is never computed.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    product: Product | None = None


Attention = Callable[[QKV], tuple[jax.Array, Any]]
"""Maps a step's own tokens to the output [rows, T, heads, head_dim] and a carry."""


class Cached(NamedTuple):
    """What is read of buffers of all layers.

    Attributes:
      keys: [layers, rows, capacity, heads, head_dim].
      values: likewise.
      layer: which layer, int32 scalar.
      spans: of slots, static; what lies in other slots is finite.
    """

    keys: jax.Array
    values: jax.Array
    layer: jax.Array
    spans: Spans


def choose_implementation(
    implementation: Implementation, dtype: jax.typing.DTypeLike, head_dim: int
) -> Chosen:
    """Return the back end that attention uses on the default device.

    "auto" is, on Hopper GPUs and for bfloat16 heads of 64 or 128 channels, "mosaic", a kernel that
    reads the cache where it lies; else cuDNN's flash attention on NVIDIA GPUs that have it (compute
    capability 8.0, half precision, heads of at most 128 channels in steps of 8), and exact XLA
    everywhere else. "mosaic" leaves small steps, and what it does not do, to cuDNN.

    Raises:
      UsageError: if the name is unknown, or "mosaic" is asked for where it does not run.
    """
    if implementation in ("cudnn", "xla"):
        return implementation
    if implementation not in ("auto", "mosaic"):
        raise UsageError(
            f"unknown attention {implementation!r}: expected auto, mosaic, cudnn or xla"
        )
    if jnp.dtype(dtype) == jnp.bfloat16 and head_dim in (WIDTH, 2 * WIDTH) and has_mosaic():
        return "mosaic"
    device = jax.devices()[0]
    if implementation == "mosaic":
        raise UsageError(
            f"attention mosaic needs a Hopper GPU, bfloat16 and heads of {WIDTH} or {2 * WIDTH} "
            f"channels, found {device.device_kind}, {jnp.dtype(dtype)} and {head_dim}: take auto"
        )
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
    if lengths is None and reads_cache(query, key.shape[1], implementation):
        nothing = Cached(key[None], value[None], jnp.int32(0), ())
        return attend_to_cache(QKV(query, key, value), nothing, scale)[0]
    if choose_implementation(implementation, query.dtype, query.shape[-1]) != "xla":
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


def reads_cache(query: jax.Array, keys: int, implementation: Implementation) -> bool:
    """Return whether ``attend_to_cache`` is the way to attend; see ``choose_implementation``.

    Args:
      query: [rows, T, heads, head_dim].
      keys: how many a query sees.
      implementation: the back end.
    """
    chosen = choose_implementation(implementation, query.dtype, query.shape[-1])
    return chosen == "mosaic" and query.size // query.shape[-1] * keys >= LEAST_WORK


def attend_to_cache(
    qkv: QKV, cached: Cached, scale: float, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Attend as ``attend`` to cached tokens and then own ones, which are not joined.

    Args:
      qkv: of the own tokens; there may be more keys and values than queries.
      cached: of the same dtype.
      scale: factor of the logits.
      lengths: how many tokens of the only span count, from its first on, for every batch row and
        head, [rows, heads] int32; None for all of all spans.

    Returns:
      The output, and the logarithm of the sum of exponentials of every query's logits,
      [rows, T, heads] float32.
    """
    # Half a second, and of no use to most.
    from amskv_jax.fused_attention.kernel import fused_attention  # noqa: PLC0415

    query, value, temperature, first_value = qkv.query, qkv.value, None, 0
    if qkv.product is not None:
        value, temperature = qkv.product
        first_value = 2 * qkv.key.shape[2]
        query = query if temperature is None else value
    return fused_attention(
        query,
        cached.keys,
        cached.values,
        cached.layer,
        qkv.key,
        value,
        lengths,
        temperature,
        first_value=first_value,
        spans=cached.spans,
        scale=scale,
    )


def mass_on_cache(qkv: QKV, cached: Cached, sums: jax.Array, scale: float) -> jax.Array:
    """Return the attention probability that every key receives, summed over the queries.

    Args:
      qkv: see ``attend_to_cache``.
      cached: likewise.
      sums: what it returned besides the output.
      scale: factor of the logits.

    Returns:
      [rows, heads, tokens] float32, cached tokens and then own ones.
    """
    from amskv_jax.fused_attention.mass import fused_mass  # noqa: PLC0415

    buffer = cached.keys, cached.layer
    return fused_mass(qkv.query, *buffer, qkv.key, sums, spans=cached.spans, scale=scale)


def attend_block_causal(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: float,
    ends: tuple[int, ...],
    implementation: Implementation = "auto",
) -> jax.Array:
    """Attend in blocks which see themselves and all earlier ones, as ``attend``; differentiable.

    XLA attends block by block, to exactly what is visible. cuDNN, which is taken for "mosaic" too,
    has no gradient for odd sizes, so it gets all at once with a mask; where even the whole is odd,
    XLA takes its place.

    Args:
      query: [rows, T, heads, head_dim].
      key: like ``query``.
      value: like ``query``.
      scale: factor of the logits.
      ends: where every block ends, ascending, the last at T.
      implementation: the back end, see ``choose_implementation``.
    """
    chosen = choose_implementation(implementation, query.dtype, query.shape[-1])
    if chosen != "xla" and ends[-1] % 2 == 0:
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
