"""Next-scale generation: one jitted function from labels and keys to tokens and pictures."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from amskv_jax.attention import Attention, Implementation
from amskv_jax.cache.layout import CacheLayout
from amskv_jax.cache.stack import Observer, apply_blocks
from amskv_jax.errors import AmskvError
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.transformer import VAR, Block
from amskv_jax.models.var.vqvae import VQVAE
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.sampling import TokenSampling, draw, filter_logits, guide, smooth_mixture

DECODED_PIXELS = 16 * 256 * 256
"""Pictures are decoded in chunks of about this many pixels: the decoder's activations are large."""


@struct.dataclass
class Samples:
    """What one call of a sampler returns.

    Attributes:
      tokens: [B, total] int32.
      pictures: [B, height, width, 3] float32 in [0, 1]; None if not decoded.
      logits: with ``trace``, the guided logits before filtering [B, total, V] float32.
      latents: with ``trace``, the accumulated latent after each scale [S, B, h, w, C] float32.
      observed: per step, what the observer returned (see ``stack.apply_blocks``).
    """

    tokens: jax.Array
    pictures: jax.Array | None = None
    logits: jax.Array | None = None
    latents: jax.Array | None = None
    observed: Any = None


@dataclass(frozen=True)
class Sampler:
    """Generates pictures with a fixed model, retention plan and way of drawing tokens.

    The object is hashable and a static argument of ``jit``: calls with other labels, keys, guidance
    or weights of the same shapes do not compile again.

    On NVIDIA GPUs with cuDNN attention, the first call of a sampler must have a device for itself:
    cuDNN loads its kernels under a capture of the stream on which XLA runs everything there, and
    what another thread of the process launches meanwhile is lost.

    Attributes:
      transformer: shape of the transformer.
      tokenizer: shape of the VQVAE.
      plan: what the cache keeps.
      sampling: how tokens are drawn.
      dtype: "float32" or "bfloat16": matrix products and cache.
      attention: back end, see ``attention.attend``.
      decode: whether to turn the latents into pictures.
      trace: whether to return logits and the latents of all scales.
      observe: looks at every layer's attention, see ``stack.Observer``.

    Raises:
      AmskvError: if plan, transformer and tokenizer do not fit together.
    """

    transformer: VARConfig
    tokenizer: VQVAEConfig
    plan: RetentionPlan
    sampling: TokenSampling = field(default_factory=TokenSampling)
    dtype: str = "float32"
    attention: Implementation = "auto"
    decode: bool = True
    trace: bool = False
    observe: Observer | None = None

    def __post_init__(self) -> None:
        config = self.transformer
        self.plan.check(config.cache_shape)
        if self.tokenizer.schedule != config.schedule:
            raise AmskvError(
                f"the tokenizer's scales are {self.tokenizer.schedule}, "
                f"the model's {config.schedule}"
            )

    @partial(jax.jit, static_argnums=0)
    def __call__(
        self, params: Any, labels: jax.Array, keys: jax.Array, guidance: jax.Array | float
    ) -> Samples:
        """Generate one picture per label.

        Args:
          params: {"transformer": ..., "tokenizer": ...}.
          labels: [B] int32, below ``num_classes``.
          keys: [B] PRNG keys, see ``picture_keys``.
          guidance: strength of classifier-free guidance at the last scale (``cfg``).
        """
        chex.assert_rank(labels, 1)
        chex.assert_equal_shape_prefix((labels, keys), 1)
        config, schedule = self.transformer, self.transformer.schedule
        model: Any = VAR(config, self.dtype)  # Flax's type of `apply` says little
        variables = {"params": params["transformer"]}
        tokenizer: Any = VQVAE(self.tokenizer, self.dtype)
        codes = {"params": params["tokenizer"]}

        batch = labels.shape[0]
        labels = jnp.concatenate([labels, jnp.full_like(labels, config.num_classes)])
        embedding, modulation, head = model.apply(variables, labels, method=VAR.condition)
        x = model.apply(variables, embedding, method=VAR.first_input)
        weights = (params["transformer"]["blocks"], modulation)

        layout = CacheLayout.of(self.plan)
        caches = layout.init(2 * batch, config.num_heads, config.head_dim, self.dtype)
        block = Block(config, self.dtype)

        def run_block(own: Any, x: jax.Array, attention: Attention) -> tuple[jax.Array, Any]:
            block_params, block_modulation = own
            return block.apply({"params": block_params}, x, block_modulation, attention)

        latent = jnp.zeros((batch, *schedule.grids[-1], config.latent_channels), jnp.float32)
        tokens, traced_logits, latents, observed = [], [], [], []
        for step in range(schedule.num_scales):
            x, caches, seen = apply_blocks(
                run_block,
                weights,
                x,
                caches,
                layout,
                step,
                scale=config.attention_scale,
                implementation=self.attention,
                observe=self.observe,
            )
            observed.append(seen)
            progress = step / max(1, schedule.num_scales - 1)
            logits = guide(model.apply(variables, x, head, method=VAR.logits), guidance, progress)
            filtered = filter_logits(logits, self.sampling.top_k, self.sampling.top_p)
            step_keys = jax.vmap(partial(jax.random.fold_in, data=step))(keys)
            tokens.append(draw(step_keys, filtered, self.sampling))
            if self.sampling.more_smooth:
                smooth_keys = jax.vmap(partial(jax.random.fold_in, data=schedule.num_scales))(
                    step_keys
                )
                mixture = smooth_mixture(smooth_keys, filtered, progress)
                codebook = params["tokenizer"]["quantizer"]["codebook"].astype(jnp.float32)
                entries = jnp.matmul(mixture, codebook, precision=lax.Precision.HIGHEST)
            else:
                entries = tokenizer.apply(codes, tokens[-1], method=VQVAE.embed)
            latent = tokenizer.apply(codes, latent, entries, step, method=VQVAE.accumulate)
            if step + 1 < schedule.num_scales:
                features = tokenizer.apply(codes, latent, step, method=VQVAE.next_input)
                x = model.apply(variables, features, step + 1, method=VAR.next_input)
                x = jnp.concatenate([x, x])
            if self.trace:
                traced_logits.append(logits)
                latents.append(latent)

        return Samples(
            tokens=jnp.concatenate(tokens, axis=1),
            pictures=self._pictures(codes, latent) if self.decode else None,
            logits=jnp.concatenate(traced_logits, axis=1) if self.trace else None,
            latents=jnp.stack(latents) if self.trace else None,
            observed=observed if self.observe else None,
        )

    def _pictures(self, codes: Any, latent: jax.Array) -> jax.Array:
        height, width = self.tokenizer.picture_size
        tokenizer = VQVAE(self.tokenizer, self.dtype)

        def decode(latent: jax.Array) -> jax.Array:
            picture = tokenizer.apply(codes, latent[None], method=VQVAE.decode)[0]
            return (picture.astype(jnp.float32) + 1) / 2

        return lax.map(decode, latent, batch_size=max(1, DECODED_PIXELS // (height * width)))


def picture_keys(key: jax.Array, count: int, first: int = 0) -> jax.Array:
    """Return the keys of pictures ``first : first + count``; each depends on its number alone."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(first, first + count))
