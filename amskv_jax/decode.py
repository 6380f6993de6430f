"""Between pictures and what is drawn: programs of their own, which all plans and policies share."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from amskv_jax.mesh import DATA, MODEL, MeshShape
from amskv_jax.models.protocol import Model
from amskv_jax.schedule import ScaleSchedule

DECODED_BYTES = 2**30
"""Pictures are decoded, and encoded, so many at a time that one layer's activations are about this
large."""


@partial(jax.jit, static_argnums=(0, 1, 2, 5))
def decode(
    model: Model,
    schedule: ScaleSchedule,
    dtype: str,
    params: Any,
    latents: jax.Array,
    mesh: MeshShape | None = None,
) -> jax.Array:
    """Return the pictures of latents.

    Args:
      model: the model's shape.
      schedule: what was drawn.
      dtype: "float32" or "bfloat16", in which the decoder computes.
      params: the weights, a tree per part; only the tokenizer's are used.
      latents: [B, h, w, C] float32, as ``Samples.latent``.
      mesh: devices which share the pictures, all of them if there are enough pictures.

    Returns:
      [B, height, width, 3] float32 in [0, 1].
    """
    if mesh is not None:
        spec = P((DATA, MODEL)) if len(latents) % mesh.size == 0 else P(DATA)
        own = partial(decode, model, schedule, dtype)
        pictures: jax.Array = mesh.run(own, params, (latents,), (spec,), spec)
        return pictures
    _, tokenizer = model.bind({"tokenizer": params["tokenizer"]}, schedule, dtype)

    def one(latent: jax.Array) -> jax.Array:
        return (tokenizer.decode(latent[None])[0].astype(jnp.float32) + 1) / 2

    return lax.map(one, latents, batch_size=max(1, DECODED_BYTES // tokenizer.activation_bytes))


@partial(jax.jit, static_argnums=(0, 1, 2, 5))
def decode_pixels(
    model: Model,
    schedule: ScaleSchedule,
    dtype: str,
    params: Any,
    latents: jax.Array,
    mesh: MeshShape | None = None,
) -> jax.Array:
    """Return the pictures of latents as uint8 [B, height, width, 3]; see ``decode``."""
    pictures = decode(model, schedule, dtype, params, latents, mesh)
    return jnp.rint(jnp.clip(pictures, 0, 1) * 255).astype(jnp.uint8)


@partial(jax.jit, static_argnums=(0, 1))
def encode_pixels(
    model: Model, schedule: ScaleSchedule, params: Any, pixels: jax.Array
) -> jax.Array:
    """Return the codes of pictures.

    Always in float32, so that they depend on the pictures and the weights alone.

    Args:
      model: the model's shape.
      schedule: whose token maps the codes are.
      params: the weights, a tree per part; only the tokenizer's are used.
      pixels: uint8 [B, height, width, 3].

    Returns:
      [B, total, *K] integers.

    Raises:
      AmskvError: if the pictures have another size than the schedule needs.
    """
    _, tokenizer = model.bind({"tokenizer": params["tokenizer"]}, schedule, "float32")

    def one(pixels: jax.Array) -> jax.Array:
        return tokenizer.encode(pixels[None].astype(jnp.float32) / 127.5 - 1)[0]

    return lax.map(one, pixels, batch_size=max(1, DECODED_BYTES // tokenizer.activation_bytes))
