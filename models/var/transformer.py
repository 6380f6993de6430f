"""The VAR transformer (arXiv 2404.02905): teacher-forced, and in the parts that generation uses."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from amskv_jax.attention import QKV, Attention, Implementation, attend_block_causal
from amskv_jax.models.guidance import Guidance
from amskv_jax.models.layers import FeedForward, Head, SelfAttention, StackedDense, layer_norm
from amskv_jax.models.module import Module
from amskv_jax.models.parts import Built, module_of
from amskv_jax.models.protocol import Prepared
from amskv_jax.models.var.config import VARConfig
from amskv_jax.stacked import in_place


class Block(Module):
    """One transformer block with adaptive layer norms."""

    config: VARConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, modulation: jax.Array, attention: Attention
    ) -> tuple[jax.Array, Any]:
        """Map the residual stream [rows, T, D] to the next one and ``attention``'s carry.

        It is summed in float32, and comes and goes as the dtype it has.

        ``modulation`` [rows, 6, D] holds two gates, two scales and two shifts, in this order; of
        each pair the first belongs to the attention, the second to the feed-forward part.
        """
        config = self.config
        gate1, gate2, scale1, scale2, shift1, shift2 = (modulation[:, i, None] for i in range(6))
        h, carry = SelfAttention(
            config.num_heads, config.attn_l2_norm, self.dtype, name="attention"
        )(layer_norm(x, scale1, shift1).astype(self.dtype), attention)
        y = x.astype(jnp.float32) + h.astype(jnp.float32) * gate1.astype(jnp.float32)
        h = FeedForward(round(config.width * config.mlp_ratio), self.dtype, name="mlp")(
            layer_norm(y, scale2, shift2).astype(self.dtype)
        )
        return (y + h.astype(jnp.float32) * gate2.astype(jnp.float32)).astype(x.dtype), carry


class VAR(Module):
    """The transformer. Blocks are stacked on a leading layer axis of the parameters.

    Attributes:
      config: its shape.
      dtype: of matrix products, the cache, and the residual stream between the blocks of a
        sampler; norms, sums and logits are float32, and in the teacher-forced pass the whole
        stream.
      attention: back end of the teacher-forced pass, see ``attention.attend``.
    """

    config: VARConfig
    dtype: Any = jnp.float32
    attention: Implementation = "auto"

    def setup(self) -> None:
        """Create the submodules; parameter names are the checkpoint format."""
        config, schedule = self.config, self.config.schedule
        width, depth = config.width, config.depth
        table = nn.initializers.truncated_normal(math.sqrt(1 / (3 * width)))
        dense = {
            "dtype": jnp.float32,
            "precision": lax.Precision.HIGHEST,
            "kernel_init": table,
        }
        self.class_embedding = nn.Embed(config.num_classes + 1, width, embedding_init=table)
        self.scale_embedding = nn.Embed(schedule.num_scales, width, embedding_init=table)
        self.position_start = self.param("position_start", table, (schedule.tokens[0], width))
        self.position_embedding = self.param("position_embedding", table, (schedule.total, width))
        self.word_embedding = nn.Dense(width, **dense)
        if config.shared_aln:
            self.shared_modulation = nn.Dense(6 * width, **dense)
            offset = nn.initializers.normal(1 / math.sqrt(width))
            self.modulation_offset = self.param("modulation_offset", offset, (depth, 6, width))
        else:
            self.modulation = StackedDense(depth, 6 * width)
        self.blocks = Block(config, self.dtype)
        self.head_modulation = nn.Dense(2 * width, **dense)
        self.head = Head(config.vocab_size, self.dtype)

    @property
    def attention_scale(self) -> float:
        """See ``protocol.Transformer``."""
        return self.config.attention_scale

    def prepare(self, condition: jax.Array, guidance: Guidance) -> Prepared:
        """See ``protocol.Transformer``; the condition is labels [B] int32."""
        without = jnp.full_like(condition, self.config.num_classes)
        embedding, modulation, head = self.condition(guidance.pair(condition, without))
        layers = in_place(self.variables["params"]["blocks"]), modulation
        return Prepared(start=self.first_input(embedding), layers=layers, shared=head)

    def block(
        self, layer: Any, shared: Any, x: jax.Array, step: int, attention: Attention
    ) -> tuple[jax.Array, Any]:
        """See ``protocol.Transformer``."""
        params, modulation = layer
        module = Block(self.config, self.dtype, parent=None)
        result: tuple[jax.Array, Any] = module.apply({"params": params}, x, modulation, attention)
        return result

    def some_rows(self, layer: Any, shared: Any, take: Callable[[Any], Any]) -> tuple[Any, Any]:
        """See ``protocol.Transformer``."""
        params, modulation = layer
        return (params, take(modulation)), take(shared)

    def condition(self, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return everything that depends on the class alone.

        Args:
          labels: [rows] int32; ``num_classes`` stands for no class.

        Returns:
          The class embeddings [rows, D] float32, the modulation of all blocks
          [depth, rows, 6, D] and of the head [rows, 2, D] (scale, shift) float32.
        """
        embedding = self.class_embedding(labels).astype(jnp.float32)
        rows, width = embedding.shape
        activated = nn.silu(embedding)
        head = self.head_modulation(activated).reshape(rows, 2, width)
        if self.config.shared_aln:
            shared = self.shared_modulation(activated).reshape(rows, 6, width)
            offset = self.modulation_offset.astype(jnp.float32)
            blocks = shared[None] + offset[:, None]
        else:
            blocks = self.modulation(activated).reshape(-1, rows, 6, width)
        return embedding, blocks.astype(self.dtype), head

    def first_input(self, embedding: jax.Array) -> jax.Array:
        """Return the input [rows, T_0, D] of the first scale from the class embeddings."""
        return (
            embedding[:, None] + self.position_start.astype(jnp.float32)[None] + self._positions(0)
        )

    def next_input(self, features: jax.Array, scale: int) -> jax.Array:
        """Return the input [rows, T, D] of a later scale from the tokenizer's [rows, T, C]."""
        return self.word_embedding(features) + self._positions(scale)

    def _positions(self, scale: int) -> jax.Array:
        """Return the embeddings of positions and scale, [1, T_scale, D] float32."""
        positions = self.position_embedding[None, self.config.schedule.slice(scale)]
        level = self.scale_embedding.embedding[None, None, scale]
        return positions.astype(jnp.float32) + level.astype(jnp.float32)

    def logits(self, x: jax.Array, head: jax.Array) -> jax.Array:
        """Return logits [rows, T, V] float32 from the residual stream and the head's modulation."""
        return self.head(layer_norm(x, head[:, 0, None], head[:, 1, None]))

    def __call__(self, labels: jax.Array, features: jax.Array) -> jax.Array:
        """Return the logits of all scales given the true earlier scales.

        Args:
          labels: [rows] int32.
          features: what the tokenizer makes of the earlier scales,
            [rows, total - T_0, latent channels] float32.

        Returns:
          [rows, total, V] float32. Tokens see their own scale and all earlier ones.
        """
        schedule = self.config.schedule
        embedding, modulation, head = self.condition(labels)
        inputs = [self.first_input(embedding)]
        for scale in range(1, schedule.num_scales):
            start = schedule.offsets[scale] - schedule.offsets[1]
            own = features[:, start : start + schedule.tokens[scale]]
            inputs.append(self.next_input(own, scale))

        def body(block: Block, x: jax.Array, modulation: jax.Array) -> tuple[jax.Array, None]:
            return block(x, modulation, self._block_causal)[0], None

        scan = nn.scan(
            nn.remat(body, policy=_is_kept_for_gradients, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.depth,
        )
        x, _ = scan(self.blocks, jnp.concatenate(inputs, axis=1), modulation)
        return self.logits(x, head)

    def _block_causal(self, qkv: QKV) -> tuple[jax.Array, None]:
        """Attend to the own scale and all earlier ones."""
        ends, scale = self.config.schedule.offsets[1:], self.config.attention_scale
        return attend_block_causal(*qkv[:3], scale, ends, self.attention), None


def _is_kept_for_gradients(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
    """Return whether a result of the forward pass is kept for the backward pass.

    Kept are products with weights and the output of fused attention. All else, float32 copies of
    the activations for the most part, is quicker to compute again than to write and read.
    """
    product: bool = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *inputs, **parameters
    )
    return product or "dot_product_attention" in primitive.name


@module_of.register
def _(config: VARConfig) -> Built:
    later = config.schedule.total - config.schedule.tokens[0]
    return VAR(config), (
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((1, later, config.latent_channels), jnp.float32),
    )
