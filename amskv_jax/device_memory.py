"""What drawing a batch needs of a device's memory, predicted before anything is traced.

The sum of named terms, each counted from shapes: no number is fitted. ``MARGIN`` alone stands for
what follows from no shape. The decoder is a program of its own, which runs when the sampler's
memory is free again; weights stay.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from amskv_jax.attention import LOGITS_BYTES, has_flash
from amskv_jax.checkpoints.weights import part_structs
from amskv_jax.decode import DECODED_BYTES
from amskv_jax.errors import OutOfMemoryError
from amskv_jax.generate import Sampler
from amskv_jax.models.protocol import Model
from amskv_jax.packed_weight import is_packed
from amskv_jax.plan.activations import Activations, block_bytes
from amskv_jax.plan.memory import MemoryReport
from amskv_jax.words import byte_size

MARGIN = 0.02
"""Share of all other terms that is added: scratch memory of libraries' kernels, weights of one
layer that are copied out of the stack, and what an allocator loses between blocks."""

PARTS = ("transformer", "tokenizer")
"""Parts of a checkpoint that are held while pictures are drawn."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that drawing needs at its peak.

    Attributes:
      terms: what for -> bytes.
    """

    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.terms.values())

    def __str__(self) -> str:
        terms = ", ".join(f"{name} {byte_size(size)}" for name, size in self.terms.items())
        return f"{byte_size(self.total)} ({terms})"


def predict(
    sampler: Sampler,
    pictures: int,
    condition: Any | None = None,
    *,
    decode: bool = True,
    in_turns: bool = False,
    work: Activations | None = None,
) -> DeviceMemory:
    """Return what one device needs to draw a batch.

    Args:
      sampler: what draws. On a mesh only pictures may be shared out, not heads.
      pictures: of the batch.
      condition: of the batch; None for the largest there can be.
      decode: whether latents become pictures too.
      in_turns: transformer and decoder are on the device one after the other, see
        ``pipeline.load``'s ``low_memory``.
      work: what a step needs on the device; that of JAX's default device if not given.
    """
    model, plan = sampler.model, sampler.plan
    work = work or sampler.activations
    own = pictures if sampler.mesh is None else -(-pictures // sampler.mesh.data)
    geometry = sampler.geometry(own)
    rows = geometry.rows
    weights, decoder = _weights(model, sampler.dtype, in_turns)
    held = model.held_bytes(rows, condition, sampler.activation_dtype)
    if work.shape.modulation:
        numbers = plan.num_layers * rows * work.shape.modulation
        held = {**held, "modulation of the blocks": numbers * work.itemsize}
    held = {**weights, **held}
    drawing = {**held, "cache": MemoryReport.of(plan, geometry).plan}
    last = plan.schedule.num_scales - 1
    phases = []
    for step, tokens in enumerate(plan.schedule.tokens):
        share = sampler.shares(step, geometry, work)
        residual = work.residual(rows, tokens)
        some = replace(geometry, rows=rows // share.blocks)
        block = block_bytes(plan, step, some, work)
        if share.blocks > 1:
            block += residual // share.blocks  # its part of the residual stream
        logits = work.head(tokens, own // share.heads, rows // own)
        phases.append({**drawing, "residual stream": residual, "activations of a block": block})
        left = drawing if step < last else held
        phases.append({**left, "residual stream": residual, "logits and drawing": logits})
    if decode:
        phases.append({**decoder, **_decoding(sampler, own)})
    most = max(phases, key=lambda terms: sum(terms.values()))
    terms = {name: size for name, size in most.items() if size}
    return DeviceMemory({**terms, "margin": int(MARGIN * sum(terms.values()))})


def predict_on_gpu(sampler: Sampler, pictures: int, *, in_turns: bool = False) -> DeviceMemory:
    """Return what an NVIDIA GPU needs to draw a batch, wherever this runs; see ``predict``."""
    flash = has_flash(sampler.activation_dtype, sampler.shape.head_dim)
    logits = 0 if flash else LOGITS_BYTES
    work = replace(sampler.activations, logits_bytes=logits)
    return predict(sampler, pictures, in_turns=in_turns, work=work)


def _weights(model: Model, dtype: str, in_turns: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of weights that are on a device while it draws, and while it decodes."""
    if not in_turns:
        both = {f"weights of the {part}": weight_bytes(model, part, dtype) for part in PARTS}
        return both, both
    structs = part_structs(model, "transformer", dtype, low_memory=True)
    packed = [leaf for leaf in jax.tree.leaves(structs, is_leaf=is_packed) if is_packed(leaf)]
    layer = sum(prod(leaf.shape[1:]) * jnp.dtype(leaf.dtype).itemsize for leaf in packed)
    drawing = {
        "weights of the transformer in 8 bits": _bytes(structs),
        "weights of a layer in full": layer,
    }
    return drawing, {"weights of the tokenizer": weight_bytes(model, "tokenizer", dtype)}


def weight_bytes(model: Model, part: str, dtype: str) -> int:
    """Return the bytes of a part's weights on a device."""
    return _bytes(part_structs(model, part, dtype))


def _bytes(structs: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(structs))


def largest_batch(need: Callable[[int], int], limit: int) -> int:
    """Return the largest batch whose next larger one needs more than ``limit``; 0 if none fits.

    Found by halving: where batches are taken in parts, one that shares out better may fit too.

    Args:
      need: bytes of a number of pictures.
      limit: bytes at hand.
    """
    few, many = 0, 1
    while need(many) <= limit:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if need(middle) <= limit else (few, middle)
    return few


def device_limit() -> int | None:
    """Return the bytes that JAX may use of a device; None where it does not say (CPU)."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit")


def check_memory(
    sampler: Sampler,
    pictures: int,
    condition: Any,
    limit: int | None,
    *,
    decode: bool = True,
    in_turns: bool = False,
) -> None:
    """Raise OutOfMemoryError, naming what fits, if a batch needs more than ``limit`` bytes.

    Nothing is checked where the limit is unknown, or where devices share the heads.

    Args:
      sampler: what draws.
      pictures: of the batch.
      condition: of the batch, arrays or structs of their shapes.
      limit: bytes at hand on every device; None if unknown.
      decode: whether latents become pictures too.
      in_turns: see ``predict``.
    """
    if limit is None or (sampler.mesh is not None and sampler.mesh.model > 1):
        return
    predicted = partial(predict, sampler, condition=condition, decode=decode, in_turns=in_turns)
    needed = predicted(pictures)
    if needed.total <= limit:
        return

    most = largest_batch(lambda count: predicted(count).total, limit)
    advice = (
        f"draw at most {most} at once (--batch-size {most})"
        if most
        else "not even one fits: take a policy that keeps less, or cache fewer bits (--cache-dtype)"
    )
    if limit == device_limit():
        advice += (
            ". JAX takes three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION "
            "says otherwise"
        )
    raise OutOfMemoryError(
        f"{pictures} pictures at once need {needed}, and there are {byte_size(limit)}: {advice}"
    )


def _decoding(sampler: Sampler, pictures: int) -> dict[str, int]:
    """Return what decoding needs: latents and pictures of the batch, activations of some.

    These are a layer's input and output, and what goes around it.
    """
    model, schedule = sampler.model, sampler.plan.schedule
    height, width = model.picture_size(schedule)
    _, tokenizer = model.bind({part: {} for part in PARTS}, schedule, sampler.activation_dtype)
    at_once = min(pictures, max(1, DECODED_BYTES // tokenizer.activation_bytes))
    return {
        "latents and pictures": pictures * (4 * prod(tokenizer.latent_shape) + 15 * height * width),
        "activations of the decoder": 3 * at_once * tokenizer.activation_bytes,
    }
