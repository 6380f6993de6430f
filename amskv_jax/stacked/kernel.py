"""A product with one layer of stacked weights, which are read where they lie; for Hopper GPUs.

Written in Pallas' Mosaic GPU dialect. The product is computed transposed: the 64 rows that an
instruction of the tensor cores takes are output channels, and its free side is the tokens, so that
few of them cost little. One warpgroup has tiles copied to shared memory, some steps ahead, the
other multiplies.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from amskv_jax.stacked.sizes import CHUNK, GRANULE, SIZES, splits_for, stages_for
from amskv_jax.stacked.tiles import shared_tiles


def product_of_layer(
    x: jax.Array, stack: jax.Array, layer: jax.Array, bias: jax.Array, *, gelu: bool
) -> jax.Array:
    """Return ``x @ stack[layer] + bias``, and of that the tanh-approximated GELU if wanted.

    Sums, bias and GELU are in float32, and are rounded once.

    Args:
      x: [T, in] bfloat16, of at most ``SIZES[-1]`` tokens.
      stack: [layers, in, out] bfloat16, both multiples of ``GRANULE``.
      layer: int32 scalar.
      bias: [out] bfloat16.
      gelu: whether GELU follows.

    Returns:
      [T, out] bfloat16.
    """
    padding = next(size for size in SIZES if size >= len(x)) - len(x)
    padded = jnp.pad(x, ((0, padding), (0, 0)))
    return _padded_product(padded, stack, layer, bias, gelu=gelu)[: len(x)]


# A program of its own within others, so that it is lowered once for every size: that takes most of
# a second.
@partial(jax.jit, static_argnames=("gelu",))
def _padded_product(
    x: jax.Array, stack: jax.Array, layer: jax.Array, bias: jax.Array, *, gelu: bool
) -> jax.Array:
    """Do what ``product_of_layer`` does, for one of ``SIZES``."""
    (tokens, inputs), outputs = x.shape, stack.shape[2]
    steps, splits = inputs // GRANULE, splits_for(inputs, outputs)
    stages, chunk = stages_for(tokens, steps // splits), min(CHUNK, tokens)

    def product_kernel(
        x_ref: Any,
        stack_ref: Any,
        layer_ref: Any,
        bias_ref: Any,
        y_ref: Any,
        x_tiles: Any,
        weight_tiles: Any,
        y_tile: Any,
        filled: Any,
        emptied: Any,
    ) -> None:
        warpgroup, split = lax.axis_index("warpgroup"), lax.axis_index("split")
        channels = pl.ds(lax.axis_index("block") * GRANULE, GRANULE)
        first = lax.div(split * steps, jnp.int32(splits))
        own_steps = lax.div((split + 1) * steps, jnp.int32(splits)) - first

        def stage(step: Any) -> Any:
            return lax.rem(step, jnp.int32(stages))

        def wait_until_emptied(step: Any, carry: None) -> None:
            @pl.when(step >= stages)
            def _() -> None:
                plgpu.barrier_wait(emptied.at[stage(step)])

        @pl.when(warpgroup == 1)
        def copy() -> None:
            chosen = layer_ref[0]

            def copy_step(step: Any, carry: None) -> None:
                wait_until_emptied(step, None)
                slot, summed = stage(step), pl.ds((first + step) * GRANULE, GRANULE)
                weight = stack_ref.at[chosen, summed, channels]
                plgpu.copy_gmem_to_smem(weight, weight_tiles.at[slot], filled.at[slot])
                plgpu.copy_gmem_to_smem(x_ref.at[:, summed], x_tiles.at[slot], filled.at[slot])

            lax.fori_loop(0, own_steps, copy_step, None)

        @pl.when(warpgroup == 0)
        def multiply() -> None:
            def accumulate(sums: Any) -> Any:
                def multiply_step(step: Any, carry: None) -> None:
                    slot = stage(step)
                    plgpu.barrier_wait(filled.at[slot])
                    weight = weight_tiles.at[slot].transpose((1, 0))
                    plgpu.wgmma(sums, weight, x_tiles.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(1)

                    @pl.when(step > 0)
                    def _() -> None:
                        plgpu.barrier_arrive(emptied.at[stage(step - 1)])

                lax.fori_loop(0, own_steps, multiply_step, None)
                return sums[...]

            sums = pl.run_scoped(accumulate, plgpu.ACC((GRANULE, tokens), jnp.float32))
            if splits == 1:
                load: Any = plgpu.load  # its parameters differ between versions of JAX
                layout = plgpu.Layout.WGMMA.reduce(1)
                own_bias = load(bias_ref.at[channels], layout=layout, optimized=False)
                sums += lax.broadcast_in_dim(own_bias.astype(jnp.float32), sums.shape, [0])
                sums = _gelu(sums) if gelu else sums
            sums = sums.astype(y_ref.dtype)
            for start in range(0, tokens, chunk):
                part = sums[:, start : start + chunk] if chunk < tokens else sums
                if start:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                y_tile.transpose((1, 0))[...] = plgpu.layout_cast(
                    part, plgpu.Layout.WGMMA_TRANSPOSED
                )
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(y_tile, y_ref.at[split, pl.ds(start, chunk), channels])
            plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    dtype = jnp.bfloat16 if splits == 1 else jnp.float32
    y = plgpu.kernel(
        product_kernel,
        out_type=jax.ShapeDtypeStruct((splits, tokens, outputs), dtype),
        scratch_types=(
            shared_tiles((stages, tokens, GRANULE), jnp.bfloat16),
            shared_tiles((stages, GRANULE, GRANULE), jnp.bfloat16),
            shared_tiles((chunk, GRANULE), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        ),
        grid=(outputs // GRANULE, splits),
        grid_names=("block", "split"),
        num_threads=2,
        thread_name="warpgroup",
        # The other way to lower a kernel takes twice as long.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(x, stack, jnp.reshape(layer, (1,)).astype(jnp.int32), bias)
    if splits == 1:
        return y[0]
    sums = y.sum(0) + bias[None].astype(jnp.float32)
    return (jax.nn.gelu(sums, approximate=True) if gelu else sums).astype(x.dtype)


def _gelu(y: jax.Array) -> jax.Array:
    """Return GELU's tanh approximation: y (1 + tanh(u)) / 2 is y / (1 + exp(-2 u))."""
    twice = -2 * math.sqrt(2 / math.pi)
    return y / (1.0 + jnp.exp(y * (twice + twice * 0.044715 * y * y)))
