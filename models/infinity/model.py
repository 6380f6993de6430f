"""Infinity as the rest of the package knows it, see ``models.protocol``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.models.guidance import UNGUIDED, Controls, Drawing, Guidance, per_scale
from amskv_jax.models.infinity.bsq import from_grids
from amskv_jax.models.infinity.bsq_config import BSQConfig
from amskv_jax.models.infinity.config import InfinityConfig
from amskv_jax.models.infinity.prompts import Prompts, TextFeatures, bucket_of
from amskv_jax.models.infinity.schedules import schedule_of, whole_of
from amskv_jax.models.infinity.text import TextCondition
from amskv_jax.models.infinity.transformer import Infinity
from amskv_jax.models.infinity.vae import BSQVAE
from amskv_jax.models.protocol import Tokenizer, Transformer
from amskv_jax.models.t5 import T5Config
from amskv_jax.plan.shape import BlockShape, CacheShape
from amskv_jax.schedule import ScaleSchedule


@dataclass(frozen=True)
class InfinityModel:
    """A text-to-image model of the Infinity family (arXiv 2412.04431).

    Attributes:
      transformer: shape of the transformer.
      tokenizer: shape of the BSQ-VAE.
      text_encoder: shape of the text encoder; None if features come from elsewhere.

    Raises:
      AmskvError: if they do not belong together.
    """

    kind: ClassVar[str] = "infinity"
    takes: ClassVar[str] = "prompts"
    drawing: ClassVar[Drawing] = Drawing(cfg=4.0, tau=0.5, top_k=0, top_p=0.97)

    transformer: InfinityConfig
    tokenizer: BSQConfig
    text_encoder: T5Config | None = None

    def __post_init__(self) -> None:
        found, expected = self.tokenizer.token_bits, self.transformer.bits
        if found != expected:
            raise AmskvError(
                f"the tokenizer has {found} bits per token, the transformer {expected}: "
                "they do not belong together"
            )
        encoder, channels = self.text_encoder, self.transformer.text_channels
        if encoder is not None and encoder.width != channels:
            raise AmskvError(
                f"the text encoder makes features of {encoder.width} channels, the transformer "
                f"takes {channels}: they do not belong together"
            )

    @property
    def parts(self) -> Mapping[str, Any]:
        """The configuration of every part that has weights."""
        parts: dict[str, Any] = {"transformer": self.transformer, "tokenizer": self.tokenizer}
        return parts if self.text_encoder is None else {**parts, "text_encoder": self.text_encoder}

    @property
    def schedule(self) -> ScaleSchedule:
        """The schedule that is drawn unless another is asked for."""
        return self.transformer.schedule

    def check_schedule(self, schedule: ScaleSchedule) -> None:
        """Raise an AmskvError, naming the nearest, if it is no schedule of the family."""
        whole_of(schedule)
        levels = self.transformer.num_levels
        if schedule.num_scales > levels:
            raise AmskvError(
                f"the schedule has {schedule.num_scales} scales, the transformer knows {levels}"
            )

    def find_schedule(self, aspect: str | None, size: str | None) -> ScaleSchedule:
        """See ``protocol.Model.find_schedule`` and ``schedules.schedule_of``."""
        if aspect is None and size is None:
            return self.schedule
        return schedule_of(aspect or "1:1", size or "1M")

    def cache_shape(self, schedule: ScaleSchedule) -> CacheShape:
        """Return what is cached."""
        config = self.transformer
        return CacheShape(schedule, config.depth, config.num_heads, config.head_dim)

    @property
    def block_shape(self) -> BlockShape:
        """See ``protocol.Model.block_shape``."""
        config = self.transformer
        return BlockShape(config.width, config.hidden, 2 * config.bits, rotary=True)

    def picture_size(self, schedule: ScaleSchedule) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        return self.tokenizer.picture_size(schedule)

    def bind(
        self, params: Mapping[str, Any], schedule: ScaleSchedule, dtype: str
    ) -> tuple[Transformer, Tokenizer]:
        """Return the two halves with their weights, as far as ``params`` has them."""
        transformer = Infinity(self.transformer, schedule, jnp.dtype(dtype))
        tokenizer = BSQVAE(self.tokenizer, schedule, jnp.dtype(dtype))
        return (
            transformer.bind({"params": params.get("transformer", {})}),
            tokenizer.bind({"params": params.get("tokenizer", {})}),
        )

    def conditions(self, wanted: Any) -> Prompts:
        """Return text features as numbered conditions; None gives a made-up one.

        Raises:
          UsageError: if it is something else, or the features do not fit the transformer.
        """
        if wanted is None:
            length, channels = bucket_of(1, self.transformer), self.transformer.text_channels
            features = np.random.default_rng(0).standard_normal((length, channels), np.float32)
            wanted = TextFeatures(0.5 * features, np.array([length]), texts=("an example",))
        if not isinstance(wanted, TextFeatures):
            raise UsageError(
                f"Infinity draws TextFeatures, not {type(wanted).__name__}: encode prompts first"
            )
        return Prompts(self.transformer, wanted)

    def forced(self, codes: np.ndarray, schedule: ScaleSchedule) -> np.ndarray:
        """See ``protocol.Model.forced``; codes are [B, tokens, bits] of zeros and ones."""
        bits = from_grids(codes, self.tokenizer, schedule)
        if bits.dtype.kind not in "biu" or bits.max() > 1 or bits.min() < 0:
            raise AmskvError(
                f"the codes are {bits.dtype} from {bits.min()} to {bits.max()}: expected bits, "
                "zeros and ones"
            )
        return bits.astype(np.uint8)

    def held_bytes(
        self, rows: int, condition: TextCondition | None, dtype: str
    ) -> Mapping[str, int]:
        """See ``protocol.Model.held_bytes``: the texts' keys and values in all blocks."""
        config = self.transformer
        tokens = config.text_maxlen if condition is None else condition.features.shape[1]
        held = 2 * config.depth * rows * tokens * config.width * jnp.dtype(dtype).itemsize
        return {f"keys and values of texts of {tokens} tokens": held}

    def guidance(self, drawing: Drawing) -> Guidance:
        """Return where guidance acts; nowhere, with one row per picture, if every cfg is 1.

        Raises:
          UsageError: if a block does not exist, or guidance acts nowhere although it is wanted.
        """
        if np.all(np.asarray(drawing.cfg) == 1):
            return UNGUIDED
        return Guidance.at(drawing.guide, self.transformer.depth)

    def controls(self, schedule: ScaleSchedule, drawing: Drawing) -> Controls:
        """Return strength and temperature of every scale.

        Raises:
          UsageError: if there are neither one nor S numbers, or one is out of range.
        """
        strength = per_scale(drawing.cfg, schedule, "cfg")
        temperature = per_scale(drawing.tau, schedule, "tau")
        if not (temperature > 0).all():
            raise UsageError(f"tau must be positive, not {temperature.min()}")
        return Controls(jnp.asarray(strength), jnp.asarray(temperature))
