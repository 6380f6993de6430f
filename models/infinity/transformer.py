"""The Infinity transformer (arXiv 2412.04431), teacher-forced, and as generation uses it."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax

from amskv_jax.attention import QKV, Attention, Implementation, attend, attend_block_causal
from amskv_jax.mesh import shards
from amskv_jax.models.guidance import UNGUIDED, Guidance
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.rotary import rotate, turns
from amskv_jax.models.infinity.text import KeysValues, Pooling, Projection, TextCondition
from amskv_jax.models.layers import (
    NORM_EPSILON,
    BlockDense,
    FeedForward,
    Head,
    RMSNorm,
    SelfAttention,
    layer_norm,
)
from amskv_jax.models.module import Module
from amskv_jax.models.parts import Built, module_of
from amskv_jax.models.protocol import Prepared
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.stacked import in_place

Turns = tuple[jax.Array, jax.Array]
"""Cosine and sine of the rotary positions, see ``rotary.turns``."""


@struct.dataclass
class Layer:
    """One block's weights and what it makes of the text; stacked, ``Prepared.layers``.

    Attributes:
      params: of ``Block``.
      key: of the text, [rows, L, heads, head_dim].
      value: likewise.
    """

    params: Any
    key: jax.Array
    value: jax.Array


@struct.dataclass
class Shared:
    """What the text is to every block and to the head.

    Attributes:
      lengths: tokens of every row's text, [rows] int32.
      modulation: of the blocks, before their own offsets, [rows, 6, D] float32.
      head: scale and shift of the last norm, [rows, 2, D] float32.
    """

    lengths: jax.Array
    modulation: jax.Array
    head: jax.Array


class CrossAttention(Module):
    """Attention to the text, whose keys and values are given.

    Attributes:
      num_heads: heads; they share the width equally.
      dtype: of the products.
      implementation: attention's back end.
    """

    num_heads: int
    dtype: Any = jnp.float32
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array
    ) -> jax.Array:
        """Map [rows, T, D] to [rows, T, D]; keys and values are [rows, L, heads, head_dim]."""
        width = x.shape[-1] // shards()
        query = BlockDense(width, dtype=self.dtype, name="query")(x)
        query = query.reshape(*x.shape[:2], self.num_heads // shards(), -1)
        scale = 1 / math.sqrt(query.shape[-1])
        output = attend(query, key, value, scale, self.implementation, lengths)
        out = BlockDense(x.shape[-1], dtype=self.dtype, is_shared=True, name="out")
        return out(output.reshape(*x.shape[:2], width))


class Block(Module):
    """One transformer block: self-attention, attention to the text, feed-forward part.

    The first and the last are between adaptive norms and gates of the pooled text, the second
    follows a norm of its own.

    Attributes:
      config: shape of the transformer.
      dtype: of matrix products.
      implementation: of the attention to the text.
    """

    config: InfinityConfig
    dtype: Any = jnp.float32
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        key: jax.Array,
        value: jax.Array,
        shared: Shared,
        turns: Turns,
        attention: Attention,
    ) -> tuple[jax.Array, Any]:
        """Map the residual stream [rows, T, D] to the next one and ``attention``'s carry.

        It is summed in float32, and comes and goes as the dtype it has.

        Args:
          x: the residual stream.
          key: of the text, [rows, L, heads, head_dim].
          value: likewise.
          shared: its modulation [rows, 6, D] holds two gates, two scales and two shifts, in this
            order; of each pair the first belongs to the self-attention.
          turns: positions of the tokens.
          attention: the self-attention.
        """
        config = self.config
        offset = self.param("modulation_offset", nn.initializers.normal(0.02), (6, config.width))
        modulation = shared.modulation + offset.astype(jnp.float32)[None]
        gate1, gate2, scale1, scale2, shift1, shift2 = (modulation[:, i, None] for i in range(6))
        h, carry = SelfAttention(
            config.num_heads,
            dtype=self.dtype,
            rotate=partial(rotate, cosine=turns[0], sine=turns[1]),
            name="attention",
        )(layer_norm(x, scale1, shift1).astype(self.dtype), attention)
        y = x.astype(jnp.float32) + h.astype(jnp.float32) * gate1
        norm = nn.LayerNorm(
            NORM_EPSILON, dtype=jnp.float32, use_fast_variance=False, name="cross_norm"
        )
        cross = CrossAttention(config.num_heads, self.dtype, self.implementation, name="cross")
        h = cross(norm(y).astype(self.dtype), key, value, shared.lengths)
        y = y + h.astype(jnp.float32)
        h = FeedForward(config.hidden, self.dtype, name="mlp")(
            layer_norm(y, scale2, shift2).astype(self.dtype)
        )
        return (y + h.astype(jnp.float32) * gate2).astype(x.dtype), carry


class Infinity(Module):
    """The transformer, which draws any schedule of its family with the same weights.

    Blocks are stacked on a leading layer axis of the parameters. Bound to weights it is a
    ``protocol.Transformer``.

    Attributes:
      config: its shape.
      schedule: the token maps.
      dtype: of matrix products, the cache, and the residual stream between the blocks of a
        sampler; norms, sums, the pooled text and logits are float32, and in the teacher-forced pass
        the whole stream.
      implementation: back end of the attention to the text, and of the teacher-forced pass.
    """

    config: InfinityConfig
    schedule: ScaleSchedule
    dtype: Any = jnp.float32
    implementation: Implementation = "auto"

    def setup(self) -> None:
        """Create the submodules; parameter names are the checkpoint format."""
        config, width = self.config, self.config.width
        table = nn.initializers.truncated_normal(math.sqrt(1 / (3 * width)))
        dense = {"dtype": jnp.float32, "precision": lax.Precision.HIGHEST, "kernel_init": table}
        shape = (config.text_maxlen, config.text_channels)
        self.unconditional_text = self.param("unconditional_text", table, shape)
        self.text_norm = RMSNorm(NORM_EPSILON)
        self.text_pooling = Pooling(width, config.pooling_heads)
        self.text_projection = Projection(width, self.dtype)
        self.text_keys_values = KeysValues(config.depth, config.num_heads, self.dtype)
        self.position_start = self.param("position_start", table, (1, width))
        self.scale_embedding = nn.Embed(config.num_levels, width, embedding_init=table)
        self.word_embedding = nn.Dense(width, **dense)
        self.shared_modulation = nn.Dense(6 * width, **dense)
        self.blocks = Block(config, self.dtype, self.implementation)
        self.head_modulation = nn.Dense(2 * width, **dense)
        self.head = Head(2 * config.bits, jnp.float32)

    @property
    def attention_scale(self) -> float:
        """Factor of the attention logits, besides the learned temperature of every head."""
        return 1.0

    def prepare(self, condition: TextCondition, guidance: Guidance) -> Prepared:
        """Return everything that depends on the texts alone."""
        start, keys, values, shared = self._prepare(condition, guidance)
        blocks = in_place(self.variables["params"]["blocks"])
        return Prepared(start, Layer(blocks, keys, values), shared)

    def block(
        self, layer: Layer, shared: Shared, x: jax.Array, step: int, attention: Attention
    ) -> tuple[jax.Array, Any]:
        """See ``protocol.Transformer``."""
        block = Block(self.config, self.dtype, self.implementation, parent=None)
        turns = self._turns(step)
        return block.apply(
            {"params": layer.params}, x, layer.key, layer.value, shared, turns, attention
        )

    def some_rows(
        self, layer: Layer, shared: Shared, take: Callable[[Any], Any]
    ) -> tuple[Layer, Shared]:
        """Return what ``block`` takes of some batch rows alone."""
        return Layer(layer.params, take(layer.key), take(layer.value)), take(shared)

    def next_input(self, features: jax.Array, step: int) -> jax.Array:
        """Return the input [rows, T, D] of a later scale from the tokenizer's [rows, T, bits]."""
        return self.word_embedding(features) + self._level(step)

    def logits(self, x: jax.Array, shared: Shared) -> jax.Array:
        """Return logits [rows, T, bits, 2] float32 from the residual stream [rows, T, D]."""
        scale, shift = shared.head[:, 0, None], shared.head[:, 1, None]
        return self.head(layer_norm(x, scale, shift)).reshape(*x.shape[:2], -1, 2)

    def __call__(self, condition: TextCondition, features: jax.Array) -> jax.Array:
        """Return the logits of all scales given the true earlier scales.

        Args:
          condition: the texts.
          features: what the tokenizer makes of the earlier scales, [B, total - T_0, bits] float32.

        Returns:
          [B, total, bits, 2] float32. Tokens see their own scale and all earlier ones.
        """
        start, keys, values, shared = self._prepare(condition, UNGUIDED)
        inputs, turns = [start], [self._turns(0)]
        for scale, (begin, end) in enumerate(pairwise(self.schedule.offsets[1:]), 1):
            own = features[:, begin - self.schedule.offsets[1] : end - self.schedule.offsets[1]]
            inputs.append(self.next_input(own, scale))
            turns.append(self._turns(scale))
        cosine, sine = (jnp.concatenate(parts) for parts in zip(*turns, strict=True))

        def body(
            block: Block, x: jax.Array, text: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, None]:
            return block(x, *text, shared, (cosine, sine), self._block_causal)[0], None

        scan = nn.scan(
            nn.remat(body, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.depth,
        )
        x, _ = scan(self.blocks, jnp.concatenate(inputs, axis=1), (keys, values))
        return self.logits(x, shared)

    def _prepare(
        self, condition: TextCondition, guidance: Guidance
    ) -> tuple[jax.Array, jax.Array, jax.Array, Shared]:
        """Return the first scale's input, the text's keys and values, and what blocks share."""
        features, lengths = condition.rows(self.unconditional_text, guidance)
        features = self.text_norm(features)
        pooled = self.text_pooling(features, lengths)
        activated = nn.silu(pooled)
        shape = (len(pooled), -1, self.config.width)
        shared = Shared(
            lengths,
            self.shared_modulation(activated).reshape(shape),
            self.head_modulation(activated).reshape(shape),
        )
        start = pooled[:, None] + self.position_start.astype(jnp.float32)[None] + self._level(0)
        keys, values = self.text_keys_values(self.text_projection(features))
        return start, keys, values, shared

    def _level(self, scale: int) -> jax.Array:
        """Return the embedding of a scale, [1, 1, D] float32."""
        return self.scale_embedding.embedding[None, None, scale].astype(jnp.float32)

    def _turns(self, scale: int) -> Turns:
        return turns(self.schedule, scale, self.config.head_dim)

    def _block_causal(self, qkv: QKV) -> tuple[jax.Array, None]:
        """Attend to the own scale and all earlier ones."""
        ends = self.schedule.offsets[1:]
        return attend_block_causal(*qkv[:3], self.attention_scale, ends, self.implementation), None


@module_of.register
def _(config: InfinityConfig) -> Built:
    struct: Any = jax.ShapeDtypeStruct
    text = TextCondition(struct((1, 1, config.text_channels), jnp.float32), struct((1,), jnp.int32))
    later = config.schedule.total - config.schedule.tokens[0]
    features = struct((1, later, config.bits), jnp.float32)
    return Infinity(config, config.schedule), (text, features)
