"""Next-scale generation: one jitted function from conditions and keys to tokens and latents."""

from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from amskv_jax.attention import Attention, Implementation, choose_implementation, logits_bytes
from amskv_jax.cache.layout import CacheLayout
from amskv_jax.cache.parts import in_parts
from amskv_jax.cache.stack import Observer, Take, apply_blocks
from amskv_jax.cache.store import Store
from amskv_jax.mesh import DATA, MeshShape, shards
from amskv_jax.models.guidance import Controls, Guidance
from amskv_jax.models.protocol import Model, Tokenizer
from amskv_jax.numbers import numbers_of
from amskv_jax.plan.activations import Activations, StepShares, step_shares
from amskv_jax.plan.memory import CacheGeometry
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.shape import CacheShape
from amskv_jax.precision import FLOAT8, activation_dtype
from amskv_jax.sampling import TokenSampling, draw, filter_logits, smooth_mixture

COMPILER_OPTIONS: dict[str, dict[str, bool]] = {
    "gpu": {
        # Products that XLA hands to Triton lose their bias and GELU to kernels of their own where
        # cuBLAS is faster after all, and trying both takes most of the time of compiling.
        "xla_gpu_enable_triton_gemm": False,
        # Reading a layer's weights in place takes the host's attention in every layer.
        "xla_gpu_enable_dynamic_slice_fusion": False,
    }
}
"""What XLA does otherwise when it compiles a sampler, by platform; see docs/performance.md."""


@struct.dataclass
class Samples:
    """What one call of a sampler returns.

    Attributes:
      tokens: as they were drawn, [B, total, *K] int32; those of forced scales were not used.
      latent: what the tokens describe, for ``decode``, [B, h, w, C] float32.
      pictures: [B, height, width, 3] float32 in [0, 1]; None before they are decoded.
      logits: with ``trace``, the guided logits before filtering [B, total, *K, V] float32.
      latents: with ``trace``, the accumulated latent after each scale [S, B, h, w, C] float32.
      observed: per step, what the observer returned (see ``stack.apply_blocks``).
    """

    tokens: jax.Array
    latent: jax.Array
    pictures: jax.Array | None = None
    logits: jax.Array | None = None
    latents: jax.Array | None = None
    observed: Any = None


@dataclass(frozen=True)
class Sampler:
    """Generates pictures with a fixed model, retention plan and way of drawing tokens.

    The object is hashable and a static argument of ``jit``: calls with other conditions, keys,
    controls or weights of the same shapes do not compile again. ``Pipeline.sampler`` makes one.

    On NVIDIA GPUs with cuDNN attention, the first call of a sampler must have a device for itself:
    cuDNN loads its kernels under a capture of the stream on which XLA runs everything there, and
    what another thread of the process launches meanwhile is lost.

    Attributes:
      model: the model's shape.
      plan: what the cache keeps, and the schedule that is drawn.
      guidance: where guidance acts, and so whether a picture has one row or two.
      sampling: how tokens are drawn.
      dtype: "float32", "bfloat16" or "float8", of matrix products; see ``activation_dtype``.
      cache_dtype: how cached numbers are kept, a name of ``numbers.NUMBERS``; None for that of
        activations.
      attention: back end, see ``attention.attend``.
      trace: whether to return logits and the latents of all scales.
      observe: looks at every layer's attention, see ``stack.Observer``.
      mesh: the devices which share the work; None for one device.

    Raises:
      AmskvError: if model and plan do not fit together.
      UsageError: if the heads do not share out over the mesh.
    """

    model: Model
    plan: RetentionPlan
    guidance: Guidance = field(default_factory=Guidance)
    sampling: TokenSampling = field(default_factory=TokenSampling)
    dtype: str = "float32"
    cache_dtype: str | None = None
    attention: Implementation = "auto"
    trace: bool = False
    observe: Observer | None = None
    mesh: MeshShape | None = None

    def __post_init__(self) -> None:
        self.model.check_schedule(self.plan.schedule)
        self.plan.check(self.shape)
        if self.mesh is not None:
            self.mesh.check(self.shape.num_heads)

    @property
    def activation_dtype(self) -> str:
        """Type of activations, see ``precision.activation_dtype``."""
        return activation_dtype(self.dtype)

    def geometry(self, pictures: int, shards: int = 1) -> CacheGeometry:
        """Return what a cached token of a batch costs where so many devices share the heads."""
        own = replace(self.shape, num_heads=self.shape.num_heads // shards)
        numbers = self.cache_dtype or self.activation_dtype
        return CacheGeometry.of(own, pictures, numbers, self.guidance.rows_per_picture)

    @property
    def activations(self) -> Activations:
        """What a step needs besides weights and cache, on JAX's default device."""
        dtype = self.activation_dtype
        chosen = choose_implementation(self.attention, dtype, self.shape.head_dim)
        logits = logits_bytes() if chosen == "xla" else 0
        copies = 1 if self.dtype in FLOAT8 else 0
        return Activations(self.model.block_shape, jnp.dtype(dtype).itemsize, logits, copies)

    def shares(self, step: int, geometry: CacheGeometry, work: Activations) -> StepShares:
        """Return in how many parts a step takes a batch; see ``plan.activations``."""
        pictures = geometry.rows // self.guidance.rows_per_picture
        share = step_shares(self.plan, step, geometry, pictures, work)
        return share if self.observe is None else replace(share, blocks=1)

    @property
    def shape(self) -> CacheShape:
        """What the model caches."""
        return self.model.cache_shape(self.plan.schedule)

    def __call__(self, params: Any, condition: Any, keys: jax.Array, controls: Controls) -> Samples:
        """Generate one picture per key.

        It compiles by itself, with ``COMPILER_OPTIONS``. Inside another ``jit`` it is part of that
        program, which then should be compiled with them.

        Args:
          params: the weights, a tree per part of the model.
          condition: what to draw, leaves [B, ...]: see ``protocol.Conditions``.
          keys: [B] PRNG keys, see ``picture_keys``.
          controls: strength of guidance, temperature, forced codes: see ``Model.controls``.

        Raises:
          UsageError: if the pictures do not share out over the mesh.
        """
        arguments = params, condition, keys, controls
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
            return self.generate(*arguments)
        samples: Samples = program(jax.default_backend())(self, *arguments)
        return samples

    def generate(self, params: Any, condition: Any, keys: jax.Array, controls: Controls) -> Samples:
        """Trace what ``__call__`` runs."""
        if self.mesh is None:
            return self._own_share(params, condition, keys, controls)
        self.mesh.check(self.shape.num_heads, len(keys))
        whole: Any = P()  # trees of specs have the form of trees of arrays
        pictures: Any = P(DATA)
        later: Any = P(None, DATA)
        forced = None if controls.forced is None else pictures
        seen = later if self.observe and self.observe.per_row else whole
        specs = Samples(
            tokens=pictures,
            latent=pictures,
            logits=pictures if self.trace else None,
            latents=later if self.trace else None,
            observed=seen if self.observe else None,
        )
        inputs = condition, keys, controls
        in_specs = pictures, pictures, Controls(whole, whole, forced)
        samples: Samples = self.mesh.run(self._own_share, params, inputs, in_specs, specs)
        return samples

    def _own_share(
        self, params: Any, condition: Any, keys: jax.Array, controls: Controls
    ) -> Samples:
        """Generate; on a mesh, one device's share of the pictures."""
        batch, schedule, guidance = len(keys), self.plan.schedule, self.guidance
        chex.assert_tree_shape_prefix(condition, (batch,))
        chex.assert_shape((controls.strength, controls.temperature), (schedule.num_scales,))
        transformer, tokenizer = self.model.bind(params, schedule, self.activation_dtype)
        prepared = transformer.prepare(condition, guidance)
        store = Store(numbers_of(self.cache_dtype or self.activation_dtype))
        layout = CacheLayout.of(self.plan, store, shards())
        geometry = self.geometry(batch, shards())
        caches = layout.init(geometry.rows, geometry.num_heads, geometry.head_dim)
        mixes = jnp.asarray(guidance.layer_flags(self.plan.num_layers))

        x = prepared.start
        latent = jnp.zeros((batch, *tokenizer.latent_shape), jnp.float32)
        tokens, traced_logits, latents, observed = [], [], [], []
        for step in range(schedule.num_scales):
            strength = controls.strength[step]

            share = self.shares(step, geometry, self.activations)

            def block(
                layer: Any,
                x: jax.Array,
                attention: Attention,
                take: Take,
                step: int = step,
                strength: jax.Array = strength,
            ) -> tuple[jax.Array, Any]:
                own, mixed = layer
                own, shared = transformer.some_rows(own, prepared.shared, take)
                x, carry = transformer.block(own, shared, x, step, attention)
                if guidance.on_layers:
                    x = guidance.mix_rows(x, strength, mixed)
                return x, carry

            x, caches, seen = apply_blocks(
                block,
                (prepared.layers, mixes),
                x.astype(self.activation_dtype),
                caches,
                layout,
                step,
                scale=transformer.attention_scale,
                implementation=self.attention,
                observe=self.observe,
                parts=share.blocks,
            )
            observed.append(seen)

            def head(
                x: jax.Array,
                shared: Any,
                keys: jax.Array,
                forced: jax.Array | None,
                step: int = step,
                strength: jax.Array = strength,
            ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
                logits = transformer.logits(x, shared) * (1 / controls.temperature[step])
                logits = guidance.mix_logits(logits, strength)
                drawn, entries = self._draw(tokenizer, keys, logits, forced, step)
                return drawn, entries, logits if self.trace else None

            drawn, entries, logits = in_parts(
                head, share.heads, x, prepared.shared, keys, controls.forced
            )
            tokens.append(drawn)
            latent = tokenizer.accumulate(latent, entries, step)
            if step + 1 < schedule.num_scales:
                features = tokenizer.next_input(latent, step)
                x = guidance.repeat(transformer.next_input(features, step + 1))
            if self.trace:
                traced_logits.append(logits)
                latents.append(latent)

        return Samples(
            tokens=jnp.concatenate(tokens, axis=1),
            latent=latent,
            logits=jnp.concatenate(traced_logits, axis=1) if self.trace else None,
            latents=jnp.stack(latents) if self.trace else None,
            observed=observed if self.observe else None,
        )

    def compile(
        self, params: Any, condition: Any, keys: jax.Array, controls: Controls
    ) -> jax.stages.Compiled:
        """Compile for arguments of these shapes, as ``__call__`` has them; arrays or structs."""
        return self.lower(params, condition, keys, controls).compile()

    def lower(
        self, params: Any, condition: Any, keys: jax.Array, controls: Controls
    ) -> jax.stages.Lowered:
        """Trace and lower for arguments of these shapes."""
        lowered: jax.stages.Lowered = program(jax.default_backend()).lower(
            self, params, condition, keys, controls
        )
        return lowered

    def _draw(
        self,
        tokenizer: Tokenizer,
        keys: jax.Array,
        logits: jax.Array,
        forced: jax.Array | None,
        step: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the tokens [B, T, *K] of one scale, and the entries [B, T, C'] that go on."""
        schedule = self.plan.schedule
        sampling = self.sampling
        greedy = sampling.top_k == 1 and not sampling.more_smooth
        filtered = logits if greedy else filter_logits(logits, sampling.top_k, sampling.top_p)
        step_keys = jax.vmap(partial(jax.random.fold_in, data=step))(keys)
        drawn = draw(step_keys, filtered, sampling)
        if forced is not None and forced.shape[1] >= schedule.offsets[step + 1]:
            return drawn, tokenizer.embed(forced[:, schedule.slice(step)])
        if not sampling.more_smooth:
            return drawn, tokenizer.embed(drawn)
        smooth_keys = jax.vmap(partial(jax.random.fold_in, data=schedule.num_scales))(step_keys)
        progress = step / max(1, schedule.num_scales - 1)
        return drawn, tokenizer.embed_mixture(smooth_mixture(smooth_keys, filtered, progress))


@lru_cache
def program(platform: str) -> Any:
    """Return ``Sampler.generate`` under ``jit``, as it is to be compiled for a platform."""
    options = COMPILER_OPTIONS.get(platform)
    return jax.jit(Sampler.generate, static_argnums=0, compiler_options=options)


def picture_keys(key: jax.Array, count: int, first: int = 0) -> jax.Array:
    """Return the keys of pictures ``first : first + count``; each depends on its number alone."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(first, first + count))
