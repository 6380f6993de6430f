"""A product of whole numbers of 8 bits with one layer of stacked weights, for Hopper GPUs.

Written in Pallas' Mosaic GPU dialect. A thread block takes one tile of the result after the other,
in turns for two warpgroups: while one multiplies, the other scales, adds the bias and writes. A
third one has tiles of operands copied to shared memory, some steps ahead.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from amskv_jax.hopper import processors
from amskv_jax.stacked.int8_rounding import int8_tokens
from amskv_jax.stacked.int8_tokens import padded_int8_tokens
from amskv_jax.stacked.sizes import INT8_PADDED, INT8_ROWS, INT8_SUMMED, INT8_WRITTEN, int8_tile
from amskv_jax.stacked.tiles import shared_tiles

REGISTERS = 240, 24
"""Registers of each thread of the warpgroups that multiply, and of the one that copies."""
TILED = 8
"""Copies take tokens in groups of so many."""
NEIGHBOURS = 16
"""Tiles of tokens that are computed with all channels before others are, so that what blocks read
at about the same time stays in the GPU's cache."""


def int8_product(
    x: jax.Array,
    stack: jax.Array,
    channel_scale: jax.Array,
    layer: jax.Array,
    bias: jax.Array,
    *,
    gelu: bool,
    dtype: DTypeLike,
) -> jax.Array:
    """Return ``x @ stack[layer].T`` times the scales plus bias, and GELU of that if wanted.

    x is rounded to int8. Sums of these numbers are exact; scales, bias and the tanh-approximated
    GELU are in float32, rounded once.

    Args:
      x: [T, in].
      stack: [layers, out, in] int8, see ``sizes.int8_tile`` for which sizes.
      channel_scale: [layers, out] float32.
      layer: int32 scalar.
      bias: [out] bfloat16.
      gelu: whether GELU follows.
      dtype: of the result.

    Returns:
      [T, out].
    """
    tokens = len(x)
    if tokens < INT8_PADDED or tokens % TILED:
        size = max(INT8_PADDED, -(-tokens // INT8_ROWS) * INT8_ROWS)
        rounded, scale = padded_int8_tokens(x.astype(jnp.bfloat16), size)
    else:
        rounded, scale = int8_tokens(x)
        scale = jnp.pad(scale, (0, -tokens % INT8_ROWS))
    chosen = jnp.stack([layer, jnp.full_like(layer, tokens)]).astype(jnp.int32)
    operands = rounded, scale, stack, channel_scale, chosen, bias
    return _padded_product(*operands, gelu=gelu, dtype=dtype)[:tokens]


# A program of its own within others, so that it is lowered once for all steps of few tokens, and
# for both runs of another step's layers.
@partial(jax.jit, static_argnames=("gelu", "dtype"))
def _padded_product(
    x: jax.Array,
    token_scale: jax.Array,
    stack: jax.Array,
    channel_scale: jax.Array,
    chosen: jax.Array,
    bias: jax.Array,
    *,
    gelu: bool,
    dtype: DTypeLike,
) -> jax.Array:
    """Do what ``int8_product`` does for the layer and the number of tokens that are ``chosen``."""
    (tokens, inputs), outputs = x.shape, stack.shape[1]
    columns, stages = int8_tile(outputs, dtype)
    steps, across, most_down = inputs // INT8_SUMMED, outputs // columns, -(-tokens // INT8_ROWS)
    blocks = min(processors(), across * most_down)

    def product_kernel(
        x_ref: Any,
        token_scale_ref: Any,
        stack_ref: Any,
        channel_scale_ref: Any,
        chosen_ref: Any,
        bias_ref: Any,
        y_ref: Any,
        x_tiles: Any,
        weight_tiles: Any,
        y_tiles: Any,
        filled: Any,
        emptied: Any,
    ) -> None:
        group, block = lax.axis_index("group"), lax.axis_index("block")
        layer = chosen_ref[0]
        down = lax.div(chosen_ref[1] + (INT8_ROWS - 1), jnp.int32(INT8_ROWS))
        tile_count = lax.div(down * across + (blocks - 1) - block, jnp.int32(blocks))

        def place(tile: Any) -> tuple[Any, Any]:
            """Return the first token and channel of one of the block's tiles."""
            number = block + tile * blocks
            of_batch = jnp.int32(NEIGHBOURS * across)
            batch, rest = lax.div(number, of_batch), lax.rem(number, of_batch)
            rows = lax.min(jnp.int32(NEIGHBOURS), down - batch * NEIGHBOURS)
            column, row = lax.div(rest, rows), lax.rem(rest, rows)
            return (batch * NEIGHBOURS + row) * INT8_ROWS, column * columns

        def barrier(owner: Any, step: Any) -> Any:
            """Return which barrier tells of a step's operands.

            Each warpgroup has its own for every stage: a barrier knows two phases only, of which
            nobody may miss one.
            """
            return owner * stages + lax.rem(step, jnp.int32(stages))

        def owner_of(step: Any) -> Any:
            return lax.rem(lax.div(step, jnp.int32(steps)), jnp.int32(2))

        def write(sums: Any, token: Any, channel: Any) -> None:
            load: Any = partial(plgpu.load, optimized=False)
            of_tokens, of_channels = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))
            own_tokens = pl.ds(token, INT8_ROWS)
            scale = load(token_scale_ref.at[own_tokens], layout=of_tokens)
            for start in range(0, columns, INT8_WRITTEN):
                part = sums[:, start : start + INT8_WRITTEN] if columns > INT8_WRITTEN else sums
                own = pl.ds(channel + start, INT8_WRITTEN)
                scales = load(channel_scale_ref.at[layer, own], layout=of_channels)
                own_bias = load(bias_ref.at[own], layout=of_channels).astype(jnp.float32)
                y = part.astype(jnp.float32) * lax.broadcast_in_dim(scale, part.shape, [0])
                y = y * lax.broadcast_in_dim(scales, part.shape, [1])
                y += lax.broadcast_in_dim(own_bias, part.shape, [1])
                y = _gelu(y) if gelu else y
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of what was written before
                y_tiles.at[group][...] = y.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(y_tiles.at[group], y_ref.at[own_tokens, own])

        @pl.when(group == 2)
        def copy() -> None:
            plgpu.set_max_registers(REGISTERS[1], action="decrease")

            def wait_until_emptied(step: Any) -> None:
                plgpu.barrier_wait(emptied.at[barrier(owner_of(step), step)])

            def copy_tile(tile: Any, carry: None) -> None:
                token, channel = place(tile)

                def copy_step(k: Any, carry: None) -> None:
                    step = tile * steps + k
                    pl.when(step >= stages)(lambda: wait_until_emptied(step - stages))
                    slot = lax.rem(step, jnp.int32(stages))
                    arrived = filled.at[barrier(owner_of(step), step)]
                    summed = pl.ds(k * INT8_SUMMED, INT8_SUMMED)
                    rows = x_ref.at[pl.ds(token, INT8_ROWS), summed]
                    plgpu.copy_gmem_to_smem(rows, x_tiles.at[slot], arrived)
                    weight = stack_ref.at[layer, pl.ds(channel, columns), summed]
                    plgpu.copy_gmem_to_smem(weight, weight_tiles.at[slot], arrived)

                lax.fori_loop(0, steps, copy_step, None)

            lax.fori_loop(0, tile_count, copy_tile, None)
            # The last in every stage, so that nobody arrives at a barrier that is gone.
            for last in range(stages):

                @pl.when(tile_count * steps > last)
                def _(last: int = last) -> None:
                    wait_until_emptied(tile_count * steps - 1 - last)

        @pl.when(group < 2)
        def multiply() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="increase")

            def multiply_tile(turn: Any, carry: None) -> None:
                tile = 2 * turn + group
                token, channel = place(tile)

                def accumulate(sums: Any) -> Any:
                    def multiply_step(k: Any, carry: None) -> None:
                        step = tile * steps + k
                        slot = lax.rem(step, jnp.int32(stages))
                        plgpu.barrier_wait(filled.at[barrier(group, step)])
                        weight = weight_tiles.at[slot].transpose((1, 0))
                        plgpu.wgmma(sums, x_tiles.at[slot], weight)
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _() -> None:
                            plgpu.barrier_arrive(emptied.at[barrier(group, step - 1)])

                    lax.fori_loop(0, steps, multiply_step, None)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(emptied.at[barrier(group, (tile + 1) * steps - 1)])
                    return sums[...]

                sums = pl.run_scoped(accumulate, plgpu.ACC((INT8_ROWS, columns), jnp.int32))
                write(sums, token, channel)

            turns = lax.div(tile_count - group + 1, jnp.int32(2))
            lax.fori_loop(0, turns, multiply_tile, None)
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        product_kernel,
        out_type=jax.ShapeDtypeStruct((tokens, outputs), dtype),
        scratch_types=(
            shared_tiles((stages, INT8_ROWS, INT8_SUMMED), jnp.int8),
            shared_tiles((stages, columns, INT8_SUMMED), jnp.int8),
            shared_tiles((2, INT8_ROWS, INT8_WRITTEN), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=2 * stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=2 * stages),
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        # The other way to lower a kernel takes twice as long.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(x, token_scale, stack, channel_scale, chosen, bias)


def _gelu(y: jax.Array) -> jax.Array:
    """Return GELU's tanh approximation; the GPU has an instruction for the tanh."""
    factor = math.sqrt(2 / math.pi)
    return 0.5 * y * (1.0 + jnp.tanh(y * (factor + factor * 0.044715 * y * y)))
