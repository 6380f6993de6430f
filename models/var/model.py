"""VAR as a kind of model: class-conditional pictures (arXiv 2404.02905)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.models.guidance import UNGUIDED, Controls, Drawing, Guidance, per_scale
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.labels import Labels
from amskv_jax.models.var.transformer import VAR
from amskv_jax.models.var.vqvae import VQVAE
from amskv_jax.plan.shape import BlockShape, CacheShape
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class VARModel:
    """Transformer and tokenizer which belong together; see ``protocol.Model``.

    Its condition is labels [B] int32.

    Attributes:
      transformer: shape of the transformer.
      tokenizer: shape of the VQVAE.

    Raises:
      AmskvError: if they do not belong together.
    """

    kind: ClassVar[str] = "var"
    takes: ClassVar[str] = "classes"
    drawing: ClassVar[Drawing] = Drawing()
    transformer: VARConfig
    tokenizer: VQVAEConfig

    def __post_init__(self) -> None:
        for name, what in (
            ("vocab_size", "codes"),
            ("latent_channels", "channels per code"),
            ("schedule", "as sides of the token maps"),
        ):
            ours, theirs = getattr(self.transformer, name), getattr(self.tokenizer, name)
            if ours != theirs:
                raise AmskvError(
                    "transformer and tokenizer do not belong together: the transformer has "
                    f"{ours} {what}, the tokenizer {theirs}"
                )

    @property
    def parts(self) -> Mapping[str, Any]:
        """See ``protocol.Model.parts``."""
        return {"transformer": self.transformer, "tokenizer": self.tokenizer}

    @property
    def schedule(self) -> ScaleSchedule:
        """The only schedule that it draws."""
        return self.transformer.schedule

    def check_schedule(self, schedule: ScaleSchedule) -> None:
        """Raise an AmskvError unless ``schedule`` is the model's own."""
        if schedule != self.schedule:
            raise AmskvError(f"the plan's scales are {schedule}, the model's {self.schedule}")

    def find_schedule(self, aspect: str | None, size: str | None) -> ScaleSchedule:
        """Return the model's own schedule; raises UsageError if another is asked for."""
        if aspect is not None or size is not None:
            height, width = self.picture_size(self.schedule)
            raise UsageError(f"the model draws pictures of {height} x {width} pixels alone")
        return self.schedule

    def cache_shape(self, schedule: ScaleSchedule) -> CacheShape:
        """See ``protocol.Model.cache_shape``."""
        return replace(self.transformer.cache_shape, schedule=schedule)

    @property
    def block_shape(self) -> BlockShape:
        """See ``protocol.Model.block_shape``."""
        config = self.transformer
        hidden = round(config.width * config.mlp_ratio)
        return BlockShape(config.width, hidden, config.vocab_size, 6 * config.width)

    def picture_size(self, schedule: ScaleSchedule) -> tuple[int, int]:
        """See ``protocol.Model.picture_size``."""
        return self.tokenizer.picture_size

    def bind(
        self, params: Mapping[str, Any], schedule: ScaleSchedule, dtype: str
    ) -> tuple[VAR, VQVAE]:
        """See ``protocol.Model.bind``."""
        transformer = VAR(self.transformer, dtype).bind({"params": params.get("transformer", {})})
        tokenizer = VQVAE(self.tokenizer, dtype).bind({"params": params.get("tokenizer", {})})
        return transformer, tokenizer

    def conditions(self, wanted: Any) -> Labels:
        """Return labels as conditions; raises UsageError if one is no class of the model.

        Args:
          wanted: class indices, [N] integers; None for all classes in turn.
        """
        return Labels.of(wanted, self.transformer.num_classes)

    def forced(self, codes: np.ndarray, schedule: ScaleSchedule) -> np.ndarray:
        """See ``protocol.Model.forced``; codes are [B, tokens] indices of the codebook."""
        codes = np.asarray(codes)
        whole, vocab = schedule.offsets[1:], self.transformer.vocab_size
        if codes.ndim != 2 or codes.shape[1] not in whole or codes.dtype.kind not in "iu":
            raise AmskvError(
                f"forced codes have shape {codes.shape} and type {codes.dtype}: expected integers "
                f"[pictures, tokens] of the first scales of {schedule}, of which there are "
                f"{', '.join(map(str, whole))}"
            )
        if codes.size and not 0 <= codes.min() <= codes.max() < vocab:
            raise AmskvError(f"forced codes must lie between 0 and {vocab - 1}")
        return codes.astype(np.int32)

    def held_bytes(self, rows: int, condition: Any | None, dtype: str) -> Mapping[str, int]:
        """See ``protocol.Model.held_bytes``."""
        return {}

    def guidance(self, drawing: Drawing) -> Guidance:
        """See ``protocol.Model.guidance``; strength 0 is none."""
        if not np.any(drawing.cfg):
            return UNGUIDED
        return Guidance.at(drawing.guide, self.transformer.depth)

    def controls(self, schedule: ScaleSchedule, drawing: Drawing) -> Controls:
        """See ``protocol.Model.controls``.

        One strength ``cfg`` is that of the last scale: g_i = 1 + cfg i / (S - 1).
        """
        strength = per_scale(drawing.cfg, schedule, "cfg")
        if np.ndim(drawing.cfg) == 0:
            strength = strength * np.linspace(0, 1, schedule.num_scales, dtype=np.float32)
        temperature = per_scale(drawing.tau, schedule, "tau")
        if (temperature <= 0).any():
            raise UsageError(f"tau must be above 0, not {temperature.min():g}: see --top-k 1")
        return Controls(jnp.asarray(1 + strength), jnp.asarray(temperature))
