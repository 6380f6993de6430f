"""Attention without masks: exact sizes decide what is visible, so every back end can be the fastest."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from amskv_jax.errors import UsageError

Implementation = Literal["auto", "cudnn", "xla"]

LOGITS_BYTES = 2**30
"""Most bytes of float32 logits the XLA back end holds at once; more are computed in query chunks."""


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
    flash = (
        device.platform == "gpu"
        and capability.replace(".", "").isdigit()
        and float(capability) >= 8.0
        and jnp.dtype(dtype).itemsize == 2
        and head_dim <= 128
        and head_dim % 8 == 0
    )
    return "cudnn" if flash else "xla"


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: float,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Return softmax(scale * query key^T) value, all queries seeing all keys.

    Args:
      query: [rows, T, heads, head_dim].
      key: [rows, S, heads, head_dim].
      value: like ``key``.
      scale: factor of the logits.
      implementation: the back end, see ``choose_implementation``; fixed when the call is traced.

    Returns:
      [rows, T, heads, head_dim] in the query's dtype. The softmax is computed in float32.
    """
    if choose_implementation(implementation, query.dtype, query.shape[-1]) == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="cudnn")
    rows, length, heads, _ = query.shape
    chunks = -(-rows * heads * length * key.shape[1] * 4 // LOGITS_BYTES)
    if chunks <= 1:
        return _exact(query, key, value, scale)
    chunk = -(-length // min(chunks, length))
    chunks = -(-length // chunk)
    padded = jnp.pad(query, ((0, 0), (0, chunks * chunk - length), (0, 0), (0, 0)))
    parts = jnp.moveaxis(padded.reshape(rows, chunks, chunk, heads, -1), 1, 0)
    output = lax.map(lambda part: _exact(part, key, value, scale), parts)
    return jnp.moveaxis(output, 0, 1).reshape(rows, chunks * chunk, heads, -1)[:, :length]


def _exact(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> jax.Array:
    precision = lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    logits = jnp.einsum(
        "btnh,bsnh->bnts", query, key, precision=precision, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(scale * logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, value, precision=precision)
