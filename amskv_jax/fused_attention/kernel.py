"""Fused attention to a layer of the cache and to a step's own tokens, which are not joined.

For Hopper GPUs, in Pallas' Mosaic GPU dialect, after FlashAttention-3 (arXiv 2407.08608). The work
is cut into units: some queries of one head of one batch row. A thread block takes one unit after
the other, or several heads' at once. In it every warpgroup but one attends for 64 queries, and the
last has blocks of keys and values copied to shared memory, some ahead of those that are in use.

Copies are of any number of tokens from any on: what is beyond the end of an axis reads as zero and
is not written, and logits of what is beyond the end of a source are set to minus infinity.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from amskv_jax.fused_attention.blocks import (
    QUERIES,
    WIDTH,
    Blocks,
    Part,
    Spans,
    Step,
    blocks_for,
    steps_of,
)
from amskv_jax.fused_attention.registers import full, norms, of_rows, weighed
from amskv_jax.fused_attention.tiles import channels, tile_memory, views
from amskv_jax.hopper import processors

LEAST = -1e30
"""What the largest logit is before there is one. The first block may have none that counts, and
exponentials of minus infinity less itself would be no numbers."""
REGISTERS = {2: (232, 40), 3: (152, 40)}
"""Attending warpgroups -> registers that each of their threads, and of those that copy, gets."""


@partial(jax.jit, static_argnames=("first_value", "spans", "scale", "blocks", "interpret"))
def fused_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array | None = None,
    temperature: jax.Array | None = None,
    *,
    spans: Spans,
    scale: float,
    first_value: int = 0,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Return softmax(scale * query K^T) V, K and V being cached tokens and then own ones.

    Args:
      query: [rows, T, heads, head_dim] bfloat16, head_dim 64 or 128. There may be more heads.
      keys: a buffer [layers, rows, capacity, heads, head_dim] bfloat16.
      values: likewise.
      layer: which of its layers is read, int32 scalar.
      key: of the own tokens, [rows, S, heads, head_dim] bfloat16.
      value: likewise; there may be more heads, and it may be the same array as ``query``.
      lengths: how many tokens of the only span count, from its first on, for every batch row and
        head, [rows, heads] int32; None for all of all spans.
      temperature: of every head, [heads] float32: queries are brought to unit length and
        multiplied by it; None for queries as they are.
      spans: slots of the buffer which are read; what lies in others must be finite.
      scale: factor of the logits.
      first_value: the head of ``value`` that belongs to the first one of ``query``.
      blocks: how the work is cut; by default what ``blocks_for`` finds.
      interpret: parameters of Pallas' interpreter, to run it on a CPU.

    Returns:
      [rows, T, heads, head_dim] bfloat16, and the logarithm of the sum of every query's
      exponentials of logits, [rows, T, heads] float32.
    """
    rows, tokens, _, head_dim = query.shape
    heads = key.shape[2]
    cut = blocks or blocks_for(tokens, rows * heads, head_dim)
    halves = head_dim // WIDTH
    parts = -(-tokens // (QUERIES * cut.queries))  # of a head's queries
    units = rows * heads // cut.heads * parts
    running = min(processors(), units) if cut.in_turn else units
    single = running == units
    to_log2 = scale * math.log2(math.e)
    ragged = lengths is not None
    steps = steps_of(spans, key.shape[1], cut.keys, apart=ragged)
    per_unit = sum(step.rounds for step in steps)

    def attention_kernel(
        layer_ref: Any,
        lengths_ref: Any,
        temperature_ref: Any,
        query_ref: Any,
        keys_ref: Any,
        values_ref: Any,
        key_ref: Any,
        value_ref: Any,
        output_ref: Any,
        sums_ref: Any,
        query_tile: Any,
        output_tile: Any,
        sums_tile: Any,
        key_tiles: Any,
        value_tiles: Any,
        query_filled: Any,
        key_filled: Any,
        value_filled: Any,
        key_emptied: Any,
        value_emptied: Any,
        turn: Any,
        *weights_tile: Any,
    ) -> None:
        own_query, query_copy = views(query_tile, interpret)
        own_output, output_copy = views(output_tile, interpret)
        own_keys, keys_copy = views(key_tiles, interpret)
        own_values, values_copy = views(value_tiles, interpret)
        block, group = lax.axis_index("block"), lax.axis_index("group")
        unit_count = 1 if single else lax.div(units - 1 - block, jnp.int32(running)) + 1

        def place(unit: Any, head: Any) -> tuple[Any, Any, Any]:
            """Return batch row, head, and first query of one of the block's units."""
            number = block + unit * running
            pair = lax.div(number, jnp.int32(parts)) * cut.heads + head
            first = lax.rem(number, jnp.int32(parts)) * (QUERIES * cut.queries)
            return lax.div(pair, jnp.int32(heads)), lax.rem(pair, jnp.int32(heads)), first

        def over_units(body: Callable[[Any, Any], Any]) -> None:
            if single:
                body(jnp.int32(0), jnp.int32(0))
            else:
                lax.fori_loop(0, unit_count, body, jnp.int32(0))

        def over_rounds(
            rounds: int, visit: Callable[..., Any], number: Any, carry: Any
        ) -> tuple[Any, Any]:
            """Visit some blocks of keys, which are numbered through all units."""

            def body(i: Any, carry: Any) -> Any:
                return visit(i, number + i, carry)

            carry = body(0, carry) if rounds == 1 else lax.fori_loop(0, rounds, body, carry)
            return number + rounds, carry

        def part_of(tile: Any, slot: Any, half: int, width: int) -> Any:
            whole = width == cut.keys
            return tile.at[slot, half] if whole else tile.at[slot, half, pl.ds(0, width)]

        @pl.when(group < cut.groups)
        def attend() -> None:
            if cut.groups in REGISTERS:
                plgpu.set_max_registers(REGISTERS[cut.groups][0], action="increase")
            head = lax.div(group, jnp.int32(cut.queries)) if cut.heads > 1 else 0
            part = lax.rem(group, jnp.int32(cut.queries)) if cut.heads > 1 else group

            def own_place(unit: Any) -> tuple[Any, Any, Any]:
                """Return batch row, queries and head of this warpgroup in one of the units."""
                row, own_head, first = place(unit, head)
                return row, pl.ds(first + part * QUERIES, QUERIES), own_head

            def load_queries(unit: Any) -> None:
                row, queries, own_head = own_place(unit)
                for half in range(halves):
                    plgpu.copy_gmem_to_smem(
                        query_ref.at[row, queries, own_head, channels(half)],
                        query_copy.at[group, half],
                        query_filled.at[group],
                    )

            def take_turn() -> None:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            load_queries(jnp.int32(0))
            if cut.turns:
                pl.when(group == 1)(take_turn)

            def factor_of(unit: Any) -> Any:
                """Return what makes products logits of base 2: for each query, or all of them."""
                if temperature is None:
                    return to_log2
                own_temperature = temperature_ref[place(unit, head)[1]]
                norm = norms([own_query.at[group, half] for half in range(halves)])
                if not single:  # or else copies of the next queries might overtake reading
                    plgpu.commit_smem()
                return to_log2 * own_temperature / norm

            def visit(unit: Any, factor: Any, step: Step, i: Any, number: Any, carry: Any) -> Any:
                sums, most, total = carry
                slot = lax.rem(number, jnp.int32(cut.stages)) + head * cut.stages
                plgpu.barrier_wait(key_filled.at[slot])

                def multiply(logits: Any) -> Any:
                    for half in range(halves):
                        tile = part_of(own_keys, slot, half, step.width)
                        plgpu.wgmma(logits, own_query.at[group, half], tile.transpose((1, 0)))
                    if cut.turns:
                        take_turn()
                    return logits[...]

                shape = QUERIES, step.width
                logits = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                plgpu.barrier_arrive(key_emptied.at[slot])
                if step is steps[-1] and not single:
                    is_last = unit + 1 < unit_count
                    if step.rounds > 1:
                        is_last &= i + 1 == step.rounds
                    pl.when(is_last)(lambda: load_queries(unit + 1))
                (source, first, _, valid), *others = step.parts
                of_cache = ragged and source == 0
                if of_cache or valid is not None:
                    position = plgpu.broadcasted_iota(
                        jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
                    )
                    # Plus a zero that the compiler does not know: it would compute the mask once
                    # for all units, and hold it in more registers than there are.
                    unknown = 0 if single else lax.shift_right_logical(number, jnp.int32(30))
                    end: Any = valid
                    for other, own in enumerate(others, 1):
                        end = jnp.where(i == other, own.valid or step.width, end)
                    if of_cache:
                        row, own_head, _ = place(unit, head)
                        end = lengths_ref[row, own_head] + spans[0][0] - first - i * cut.keys
                    logits = jnp.where(position < end + unknown, logits, -jnp.inf)
                larger = jnp.maximum(most, logits.max(axis=1) * factor)
                weights = jnp.exp2(logits * of_rows(factor, shape) - of_rows(larger, shape))
                shrunk = jnp.exp2(most - larger)
                total = total * shrunk + weights.sum(axis=1)
                sums = tuple(own * of_rows(shrunk, own.shape) for own in sums)
                rounded = weights.astype(query.dtype)
                if cut.turns:
                    plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(value_filled.at[slot])
                if cut.turns:
                    plgpu.barrier_wait(turn)
                tiles = [part_of(own_values, slot, half, step.width) for half in range(halves)]
                if interpret:
                    sums = weighed(sums, rounded, tiles, weights_tile[0].at[group])
                else:

                    def weigh(accumulators: Any) -> None:
                        for accumulator, tile in zip(accumulators, tiles, strict=True):
                            plgpu.wgmma(accumulator, rounded, tile)

                    sums = pl.run_state(weigh)(tuple(plgpu.ACC.init(own) for own in sums))
                plgpu.barrier_arrive(value_emptied.at[slot])
                return tuple(sums), larger, total

            def run_unit(unit: Any, number: Any) -> Any:
                plgpu.barrier_wait(query_filled.at[group])
                of_queries = plgpu.Layout.WGMMA.reduce(1)
                carry = (
                    tuple(full((QUERIES, WIDTH), 0, plgpu.Layout.WGMMA) for _ in range(halves)),
                    full((QUERIES,), LEAST, of_queries),
                    full((QUERIES,), 0, of_queries),
                )
                factor = factor_of(unit)
                for step in steps:
                    number, carry = over_rounds(
                        step.rounds, partial(visit, unit, factor, step), number, carry
                    )
                sums, most, total = carry
                if not single:  # until what was written before has been read
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for half, own in enumerate(sums):
                    whole = own * of_rows(1 / total, own.shape)
                    own_output.at[group, half][...] = whole.astype(query.dtype)
                sums_tile.at[group][...] = (most + jnp.log2(total)) * math.log(2)
                plgpu.commit_smem()
                row, queries, own_head = own_place(unit)
                for half in range(halves):
                    target = output_ref.at[row, queries, own_head, channels(half)]
                    plgpu.copy_smem_to_gmem(output_copy.at[group, half], target)
                plgpu.copy_smem_to_gmem(sums_tile.at[group], sums_ref.at[row, own_head, queries])
                return number

            over_units(run_unit)
            if cut.turns:
                pl.when(group == 0)(take_turn)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == cut.groups)
        def copy() -> None:
            if cut.groups in REGISTERS:
                plgpu.set_max_registers(REGISTERS[cut.groups][1], action="decrease")
            chosen = layer_ref[0]
            kinds = (
                ((keys_ref, key_ref), 0, keys_copy, key_filled, key_emptied),
                ((values_ref, value_ref), first_value, values_copy, value_filled, value_emptied),
            )

            def run_unit(unit: Any, number: Any) -> Any:
                places = [place(unit, head)[:2] for head in range(cut.heads)]

                def visit(part: Part, width: int, i: Any, number: Any, carry: Any) -> Any:
                    for head, (row, own_head) in enumerate(places):
                        slot = lax.rem(number, jnp.int32(cut.stages)) + head * cut.stages
                        for sources, first_head, tile, filled, emptied in kinds:

                            @pl.when(number >= cut.stages)
                            def _(emptied: Any = emptied, slot: Any = slot) -> None:
                                plgpu.barrier_wait(emptied.at[slot])

                            source = sources[part.source]
                            source = source if part.source else source.at[chosen]
                            source_head = own_head + (first_head if part.source else 0)
                            # A start that is computed: of others it would be checked that the
                            # block ends within the axis.
                            first = lax.add(jnp.int32(part.first), jnp.int32(i * cut.keys))
                            some = pl.ds(first, width)
                            for half in range(halves):
                                plgpu.copy_gmem_to_smem(
                                    source.at[row, some, source_head, channels(half)],
                                    part_of(tile, slot, half, width),
                                    filled.at[slot],
                                )
                    return carry

                for step in steps:
                    for part in step.parts:
                        number, _ = over_rounds(
                            part.rounds, partial(visit, part, step.width), number, jnp.int32(0)
                        )
                return number

            over_units(run_unit)
            # The last block in every stage, so that nobody arrives at a barrier that is gone.
            for stage in range(cut.stages):

                def finish(stage: int = stage) -> None:
                    for head in range(cut.heads):
                        for emptied in (key_emptied, value_emptied):
                            plgpu.barrier_wait(emptied.at[head * cut.stages + stage])

                if stage < per_unit:
                    finish()
                else:
                    pl.when(unit_count * per_unit > stage)(finish)

    shared = partial(tile_memory, dtype=query.dtype, interpret=interpret)
    ring = cut.heads * cut.stages
    filled = plgpu.Barrier(num_arrivals=halves, num_barriers=ring)
    emptied = plgpu.Barrier(num_arrivals=cut.queries, num_barriers=ring)
    padded = parts * QUERIES * cut.queries
    output, sums = plgpu.kernel(
        attention_kernel,
        out_type=(
            jax.ShapeDtypeStruct((rows, tokens, heads, head_dim), query.dtype),
            jax.ShapeDtypeStruct((rows, heads, padded), jnp.float32),
        ),
        grid=(running,),
        grid_names=("block",),
        num_threads=cut.groups + 1,
        thread_name="group",
        scratch_types=[
            shared(cut.groups, halves, QUERIES, WIDTH),
            shared(cut.groups, halves, QUERIES, WIDTH),
            plgpu.SMEM((cut.groups, QUERIES), jnp.float32),
            shared(ring, halves, cut.keys, WIDTH),
            shared(ring, halves, cut.keys, WIDTH),
            plgpu.Barrier(num_arrivals=halves, num_barriers=cut.groups),
            filled,
            filled,
            emptied,
            emptied,
            plgpu.Barrier(num_arrivals=cut.groups),
            *([plgpu.SMEM((cut.groups, QUERIES, cut.keys), query.dtype)] if interpret else []),
        ],
        # The other way to lower a kernel takes twice as long.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(
        jnp.reshape(layer, (1,)).astype(jnp.int32),
        jnp.zeros((1, 1), jnp.int32) if lengths is None else lengths,
        jnp.zeros(1, jnp.float32) if temperature is None else temperature,
        query,
        keys,
        values,
        key,
        value,
    )
    return output, jnp.swapaxes(sums[:, :, :tokens], 1, 2)
