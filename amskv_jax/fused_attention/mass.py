"""The attention probability that every key receives, of cached tokens and a step's own ones.

For Hopper GPUs, in Pallas' Mosaic GPU dialect. Logits stay in registers: they are computed
transposed, so that the 64 rows which an instruction of the tensor cores takes are keys, and the sum
over queries runs along its free side. A thread block is one warpgroup. It holds some queries of
one head of one batch row, and has all keys copied to shared memory, block by block and some ahead
of the one that is in use. Several thread blocks share a processor, and wait at different times.

Copies are of any number of tokens from any on: what is beyond the end of an axis reads as zero.
"""

import math
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from amskv_jax.fused_attention.blocks import WIDTH, Spans
from amskv_jax.fused_attention.tiles import channels, tile_memory, views

BLOCK = 64
"""Keys, and queries, that are multiplied at once."""
STAGES = 2
"""Blocks of keys in shared memory."""
CHANNELS = 256 * WIDTH
"""Most of them in the queries that a thread block holds: 32 KiB."""


@partial(jax.jit, static_argnames=("spans", "scale", "interpret"))
def fused_mass(
    query: jax.Array,
    keys: jax.Array,
    layer: jax.Array,
    key: jax.Array,
    sums: jax.Array,
    *,
    spans: Spans,
    scale: float,
    interpret: Any = None,
) -> jax.Array:
    """Return the attention probability of every key, summed over the queries.

    It is the score by which H2O (arXiv 2306.14048) chooses what stays in the cache.

    Args:
      query: [rows, T, heads, head_dim] bfloat16, head_dim 64 or 128.
      keys: a buffer [layers, rows, capacity, heads, head_dim] bfloat16.
      layer: which of its layers is read, int32 scalar.
      key: of the own tokens, [rows, S, heads, head_dim] bfloat16.
      sums: the logarithm of the sum of exponentials of every query's logits, [rows, T, heads]
        float32, as ``fused_attention`` returns it.
      spans: slots of the buffer which are read.
      scale: factor of the logits.
      interpret: parameters of Pallas' interpreter, to run it on a CPU.

    Returns:
      [rows, heads, slots of all spans + S] float32, in this order.
    """
    rows, tokens, heads, head_dim = query.shape
    halves = head_dim // WIDTH
    query_blocks = -(-tokens // BLOCK)
    parts = -(-query_blocks * BLOCK * head_dim // CHANNELS)
    own_blocks = -(-query_blocks // parts)  # of queries, which a thread block holds
    held = own_blocks * BLOCK
    sums = jnp.swapaxes(sums, 1, 2) * math.log2(math.e)
    # Where there is no query the sum is infinite, and the probability zero.
    padding = (0, 0), (0, 0), (0, parts * held - tokens)
    sums = jnp.pad(sums, padding, constant_values=jnp.inf)
    sums = sums.reshape(rows, heads, parts * own_blocks, BLOCK)
    to_log2 = scale * math.log2(math.e)
    sources = [*((0, *span) for span in spans), (1, 0, key.shape[1])]
    sources = [source for source in sources if source[2]]
    counts = [-(-length // BLOCK) for _, _, length in sources]
    *starts, blocks = accumulate(counts, initial=0)  # in blocks of keys

    def mass_kernel(
        layer_ref: Any,
        query_ref: Any,
        keys_ref: Any,
        key_ref: Any,
        sums_ref: Any,
        mass_ref: Any,
        query_tile: Any,
        key_tiles: Any,
        sums_tile: Any,
        mass_tiles: Any,
        query_filled: Any,
        key_filled: Any,
    ) -> None:
        own_query, query_copy = views(query_tile, interpret)
        own_keys, keys_copy = views(key_tiles, interpret)
        pair, part = lax.axis_index("pair"), lax.axis_index("part")
        row, head = lax.div(pair, jnp.int32(heads)), lax.rem(pair, jnp.int32(heads))
        chosen = layer_ref[0]

        def copy_keys(number: Any) -> None:
            """Have a block of keys copied; they are numbered through all sources."""
            for (own, first, _), start, count in zip(sources, starts, counts, strict=True):

                @pl.when((number >= start) & (number < start + count))
                def _(own: int = own, first: int = first, start: int = start) -> None:
                    source = key_ref if own else keys_ref.at[chosen]
                    slot = lax.rem(number, jnp.int32(STAGES))
                    some = pl.ds(first + (number - start) * BLOCK, BLOCK)
                    for half in range(halves):
                        plgpu.copy_gmem_to_smem(
                            source.at[row, some, head, channels(half)],
                            keys_copy.at[slot, half],
                            key_filled.at[slot],
                        )

        def sum_block(number: Any, carry: None) -> None:
            slot = lax.rem(number, jnp.int32(STAGES))
            plgpu.barrier_wait(key_filled.at[slot])

            def add_block(block: Any, mass: jax.Array) -> jax.Array:
                def multiply(logits: Any) -> Any:
                    for half in range(halves):
                        queries = own_query.at[block, half].transpose((1, 0))
                        plgpu.wgmma(logits, own_keys.at[slot, half], queries)
                    return logits[...]

                logits = pl.run_scoped(multiply, plgpu.ACC((BLOCK, BLOCK), jnp.float32))
                load: Any = plgpu.load  # its parameters differ between versions of JAX
                own_sums = load(sums_tile.at[block], layout=plgpu.Layout.WGMMA.reduce(0))
                shift = lax.broadcast_in_dim(own_sums, logits.shape, [1])
                return mass + jnp.exp2(logits * to_log2 - shift).sum(axis=1)

            zeros = jnp.zeros((BLOCK,), jnp.float32)
            mass = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA.reduce(1))
            mass = lax.fori_loop(0, own_blocks, add_block, mass)
            copy_keys(number + STAGES)
            plgpu.wait_smem_to_gmem(STAGES - 1, wait_read_only=True)
            mass_tiles.at[slot][...] = mass
            plgpu.commit_smem()
            target = mass_ref.at[row, head, part, pl.ds(number * BLOCK, BLOCK)]
            plgpu.copy_smem_to_gmem(mass_tiles.at[slot], target)

        for number in range(min(STAGES, blocks)):
            copy_keys(jnp.int32(number))
        own_sums = sums_ref.at[row, head, pl.ds(part * own_blocks, own_blocks)]
        plgpu.copy_gmem_to_smem(own_sums, sums_tile, query_filled)
        for block in range(own_blocks):
            for half in range(halves):
                some = pl.ds(part * held + block * BLOCK, BLOCK)
                plgpu.copy_gmem_to_smem(
                    query_ref.at[row, some, head, channels(half)],
                    query_copy.at[block, half],
                    query_filled,
                )
        plgpu.barrier_wait(query_filled)
        lax.fori_loop(0, blocks, sum_block, None)
        plgpu.wait_smem_to_gmem(0)

    shared = partial(tile_memory, dtype=query.dtype, interpret=interpret)
    mass = plgpu.kernel(
        mass_kernel,
        out_type=jax.ShapeDtypeStruct((rows, heads, parts, blocks * BLOCK), jnp.float32),
        grid=(rows * heads, parts),
        grid_names=("pair", "part"),
        scratch_types=[
            shared(own_blocks, halves, BLOCK, WIDTH),
            shared(STAGES, halves, BLOCK, WIDTH),
            plgpu.SMEM((own_blocks, BLOCK), jnp.float32),
            plgpu.SMEM((STAGES, BLOCK), jnp.float32),
            plgpu.Barrier(num_arrivals=1 + own_blocks * halves),
            plgpu.Barrier(num_arrivals=halves, num_barriers=STAGES),
        ],
        # The other way to lower a kernel takes twice as long.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(jnp.reshape(layer, (1,)).astype(jnp.int32), query, keys, key, sums)
    mass = mass.sum(2)
    firsts = [start * BLOCK for start in starts]
    own = [mass[:, :, at : at + source[2]] for at, source in zip(firsts, sources, strict=True)]
    return jnp.concatenate(own, axis=2)
