"""Loading a checkpoint and sampling from it: the short way to pictures."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from amskv_jax.attention import Implementation
from amskv_jax.cache.stack import Observer
from amskv_jax.checkpoints.embedded import find_checkpoint
from amskv_jax.checkpoints.folder import load_checkpoint, load_on_host, read_info
from amskv_jax.checkpoints.info import CheckpointInfo
from amskv_jax.decode import decode
from amskv_jax.drawing import Drawer
from amskv_jax.errors import UsageError
from amskv_jax.float8 import check_float8
from amskv_jax.generate import Sampler, Samples, picture_keys
from amskv_jax.mesh import MeshShape
from amskv_jax.models.guidance import Controls, Drawing
from amskv_jax.models.protocol import Conditions, Model
from amskv_jax.plan.memory import CacheGeometry
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.shape import CacheShape
from amskv_jax.plan.stats import LayerStats
from amskv_jax.policies import Full, Policy
from amskv_jax.precision import FLOAT8, activation_dtype
from amskv_jax.sampling import TokenSampling
from amskv_jax.schedule import ScaleSchedule
from amskv_jax.text.reader import PromptReader

DRAWING_PARTS = ("transformer", "tokenizer")
"""Parts of a checkpoint that drawing needs."""


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A model with its weights on the default device, or shared by the devices of a mesh.

    Attributes:
      model: the model's shape.
      params: the weights, a tree per part.
      schedule: what is drawn.
      dtype: "float32" or "bfloat16", of weights, matrix products and cache; or one of
        ``precision.FLOAT8``, of the products that it names and their weights, all else being in
        bfloat16.
      drawing: how pictures are drawn unless a call says otherwise.
      fingerprint: of the weights, see ``checkpoints.weights.Fingerprint``.
      classes: names of the classes; none if they are not known.
      encode: turns what a user types into what ``Model.conditions`` takes; None where these are
        the same.
      default: what is drawn where nothing else is asked for; the model's own examples if None.
      cache_dtype: how cached numbers are kept, a name of ``numbers.NUMBERS``; None for that of
        activations.
      mesh: the devices which share the work; None for JAX's default device.
      low_memory: the weights are the host's, and on the device part after part: see ``load``.
    """

    model: Model
    params: Any
    schedule: ScaleSchedule
    dtype: str
    drawing: Drawing
    fingerprint: str = ""
    classes: tuple[str, ...] = ()
    encode: Callable[[Any], Any] | None = None
    default: Conditions | None = None
    cache_dtype: str | None = None
    mesh: MeshShape | None = None
    low_memory: bool = False

    @classmethod
    def of(
        cls,
        info: CheckpointInfo,
        params: Any = None,
        dtype: str | None = None,
        *,
        schedule: ScaleSchedule | None = None,
        encode: Callable[[Any], Any] | None = None,
        mesh: MeshShape | None = None,
        low_memory: bool = False,
    ) -> "Pipeline":
        """Return the pipeline of a checkpoint.

        Args:
          info: what the checkpoint says about itself.
          params: its weights in ``dtype``; None for what needs none, such as plans.
          dtype: as in ``load``.
          schedule: what is drawn; the model's own if not given.
          encode: see the class.
          mesh: on whose devices the weights are.
          low_memory: see the class.

        Raises:
          AmskvError: if the model cannot draw the schedule.
        """
        if schedule is not None:
            info.model.check_schedule(schedule)
        return cls(
            model=info.model,
            params=params,
            schedule=schedule or info.model.schedule,
            dtype=dtype or info.dtype,
            drawing=info.drawing,
            fingerprint=info.fingerprint,
            classes=info.classes,
            encode=encode,
            mesh=mesh,
            low_memory=low_memory,
        )

    @property
    def shape(self) -> CacheShape:
        """What the model caches."""
        return self.model.cache_shape(self.schedule)

    @property
    def activation_dtype(self) -> str:
        """Type of activations, see ``precision.activation_dtype``."""
        return activation_dtype(self.dtype)

    def geometry(self, pictures: int, drawing: Drawing | None = None) -> CacheGeometry:
        """Return what the cache of a batch costs per token; ``self.drawing`` if none is given."""
        rows = self.model.guidance(drawing or self.drawing).rows_per_picture
        return CacheGeometry.of(
            self.shape, pictures, self.cache_dtype or self.activation_dtype, rows
        )

    def plan(self, policy: Policy, stats: LayerStats | None = None) -> RetentionPlan:
        """Return what a policy keeps of this model's cache.

        Raises:
          AmskvError: if policy or statistics do not fit the model.
        """
        if stats is not None:
            stats.check(self.shape, self.fingerprint or None)
        return policy.plan(self.shape, stats)

    def sampler(
        self,
        plan: RetentionPlan | Policy = Full(),  # noqa: B008 (frozen)
        drawing: Drawing | None = None,
        *,
        stats: LayerStats | None = None,
        attention: Implementation = "auto",
        trace: bool = False,
        observe: Observer | None = None,
    ) -> Sampler:
        """Return the compiled part of ``sample``, for use with ``params``.

        Args:
          plan: what the cache keeps, or the policy that says so.
          drawing: how pictures are drawn; ``self.drawing`` if not given.
          stats: what calibration measured, for policies that use it.
          attention: back end, see ``attention.attend``.
          trace: see ``Sampler``.
          observe: see ``Sampler``.

        Raises:
          AmskvError: if something does not fit the model.
        """
        drawing = drawing or self.drawing
        return Sampler(
            model=self.model,
            plan=plan if isinstance(plan, RetentionPlan) else self.plan(plan, stats),
            guidance=self.model.guidance(drawing),
            sampling=TokenSampling(drawing.top_k, drawing.top_p, drawing.more_smooth),
            dtype=self.dtype,
            cache_dtype=self.cache_dtype,
            attention=attention,
            trace=trace,
            observe=observe,
            mesh=self.mesh,
        )

    def controls(
        self, drawing: Drawing | None = None, forced: np.ndarray | None = None
    ) -> Controls:
        """Return what a call of a sampler needs to draw so.

        Args:
          drawing: how; ``self.drawing`` if not given.
          forced: codes for the first scales of N pictures, see ``Model.forced``.

        Raises:
          AmskvError: if the model cannot draw so.
        """
        controls = self.model.controls(self.schedule, drawing or self.drawing)
        if forced is None:
            return controls
        return controls.replace(forced=self.model.forced(forced, self.schedule))  # type: ignore[attr-defined]

    def conditions(self, wanted: Any) -> Conditions:
        """Return what a user asks for as numbered conditions.

        Args:
          wanted: what the kind of model takes, such as class indices [N]; None for an example of
            each.

        Raises:
          UsageError: if it cannot be drawn.
        """
        if wanted is None and self.default is not None:
            return self.default
        encoded = wanted if self.encode is None or wanted is None else self.encode(wanted)
        return self.model.conditions(encoded)

    def drawer(
        self,
        sampler: Sampler,
        conditions: Conditions,
        batch: int,
        drawing: Drawing | None = None,
        *,
        forced: np.ndarray | None = None,
        decode: bool = True,
        device_memory: int | None = None,
    ) -> Drawer:
        """Compile a sampler of this pipeline for batches; see ``drawing.Drawer``."""
        return Drawer(
            sampler,
            self.params,
            conditions,
            self.controls(drawing, forced),
            batch,
            decode=decode,
            in_turns=self.low_memory,
            device_memory=device_memory,
        )

    def sample(
        self,
        wanted: Any,
        *,
        key: jax.Array,
        policy: Policy = Full(),  # noqa: B008 (frozen)
        stats: LayerStats | None = None,
        attention: Implementation = "auto",
        aspect: str | None = None,
        size: str | None = None,
        forced: np.ndarray | None = None,
        **drawing: Any,
    ) -> Samples:
        """Generate one picture for everything that is wanted, all in one batch.

        The first call for a policy, a way of drawing and a number of pictures compiles. A picture
        depends on its condition, the key and its place, and not on its neighbours.

        Args:
          wanted: what the kind of model draws: class indices [B]; prompts, ``text.Texts`` or
            ``text.TextFeatures``.
          key: PRNG key, ``jax.random.key(seed)``.
          policy: what the cache keeps.
          stats: what calibration measured, for policies that use it.
          attention: back end, see ``attention.attend``.
          aspect: width and height, such as "16:9", for models that draw several.
          size: name of a size, such as "1M", likewise.
          forced: codes for the first scales, see ``Model.forced``.
          **drawing: fields of ``Drawing`` that shall differ from ``self.drawing``, such as
            ``cfg=4.0`` or ``top_k=1``.

        Returns:
          Tokens [B, total, *K] int32 and pictures [B, height, width, 3] float32 in [0, 1].

        Raises:
          UsageError: if nothing is wanted, or something that the model cannot draw, or an option is
            out of range.
          AmskvError: if policy or statistics do not fit the model, or products are in float8, and
            the device has none.
        """
        check_float8(self.dtype)
        if aspect is not None or size is not None:
            pipe = replace(self, schedule=self.model.find_schedule(aspect, size))
            return pipe.sample(
                wanted,
                key=key,
                policy=policy,
                stats=stats,
                attention=attention,
                forced=forced,
                **drawing,
            )
        conditions = self.conditions(wanted)
        chosen = replace(self.drawing, **{k: v for k, v in drawing.items() if v is not None})
        sampler = self.sampler(policy, chosen, stats=stats, attention=attention)
        count = len(conditions)
        batch = count if self.mesh is None else self.mesh.filled(count)
        condition = conditions.batch(np.arange(batch))
        keys = picture_keys(key, batch)
        if forced is not None and len(forced) == count:
            forced = np.asarray(forced)[np.arange(batch) % count]
        controls = self.controls(chosen, forced)
        samples: Samples = sampler(self.params, condition, keys, controls)
        if self.low_memory:  # the transformer's weights go before the decoder's come
            jax.block_until_ready(samples)
        tokenizer = {"tokenizer": self.params["tokenizer"]}
        how = self.model, self.schedule, self.activation_dtype
        pictures = decode(*how, tokenizer, samples.latent, self.mesh)
        samples = replace(samples, pictures=pictures)
        return samples if batch == count else jax.tree.map(lambda leaf: leaf[:count], samples)


def load(
    source: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    *,
    weights: bool = True,
    mesh: MeshShape | None = None,
    low_memory: bool = False,
) -> Pipeline:
    """Load a checkpoint onto the default device, or the devices of a mesh.

    Args:
      source: a folder made by ``convert_var`` or ``init_checkpoint``, a packed checkpoint, an
        address of the Hugging Face hub such as "hf://user/repository@revision", or the name of an
        embedded model; by default "var-cifar10".
      dtype: "float32", "bfloat16" or "float8", see ``Pipeline``; None takes the one in which the
        weights are stored. A device without float8 products can score, but not draw with it.
      weights: load them too; plans and conditions need none. The text encoder's never are: it is
        loaded when there are prompts to encode, and dropped again.
      mesh: devices which share the work; each gets no more of the weights than it needs.
      low_memory: for a device with little memory. Weights stay on the host, transformer and decoder
        are on the device one after the other, and the transformer's kernels are there in 8 bits,
        as in packed checkpoints, of which a layer at a time is widened. Pictures of a packed
        checkpoint are the same; weights of others are rounded.

    Raises:
      AmskvError: if this is no checkpoint, or damaged, or cannot be downloaded, or there are too
        few devices.
      UsageError: if the heads do not share out over the mesh, or there is one, or "float8", with
        ``low_memory``.
    """
    if low_memory and mesh is not None:
        raise UsageError("low_memory is for one device, not a mesh: leave one of them out")
    if low_memory and dtype in FLOAT8:
        raise UsageError(
            "low_memory keeps weights in 8 bits of another kind than float8: leave one of them out"
        )
    place = find_checkpoint(source)
    info = read_info(place)
    if mesh is not None:
        mesh.check(info.model.cache_shape(info.model.schedule).num_heads)
    params = load_weights(place, dtype, mesh, low_memory) if weights else None
    reading = activation_dtype(dtype) if dtype else None
    encode = PromptReader(place, reading, mesh) if info.model.takes == "prompts" else None
    return Pipeline.of(info, params, dtype, encode=encode, mesh=mesh, low_memory=low_memory)


def load_weights(
    place: str | os.PathLike[str],
    dtype: str | None = None,
    mesh: MeshShape | None = None,
    low_memory: bool = False,
) -> dict[str, Any]:
    """Return ``Pipeline.params`` of a checkpoint on this machine; see ``load``."""
    if low_memory:
        return load_on_host(place, dtype, DRAWING_PARTS).params
    return load_checkpoint(place, dtype, DRAWING_PARTS, mesh).params
