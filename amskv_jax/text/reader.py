"""What a user types, turned into what a text-to-image model draws."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from amskv_jax.checkpoints.folder import load_checkpoint, read_file, read_info
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.mesh import MeshShape
from amskv_jax.models.infinity.prompts import TextFeatures
from amskv_jax.models.t5 import T5Config
from amskv_jax.text.encoder import TextEncoder
from amskv_jax.text.prompts import TOKENIZER_FILE, PromptTokenizer

PART = "text_encoder"
"""Name of the text encoder's part in a checkpoint."""


@dataclass(frozen=True)
class Texts:
    """Prompts, and what is to be kept away from.

    Attributes:
      prompts: one text per picture.
      negative: none, one for all pictures, or one for each.
    """

    prompts: tuple[str, ...]
    negative: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptReader:
    """Encodes prompts with the text encoder of a checkpoint.

    The encoder is loaded for the call and dropped after it, so that it does not lie on the device
    beside what draws.

    Attributes:
      place: of the checkpoint.
      dtype: of the encoder's products; None for that of its weights.
      mesh: devices which share the encoder.
    """

    place: str | os.PathLike[str]
    dtype: str | None = None
    mesh: MeshShape | None = None

    def __call__(self, wanted: TextFeatures | Texts | str | Sequence[str]) -> TextFeatures:
        """Return the features of prompts; features stay what they are.

        Raises:
          UsageError: if something else is wanted, or a text is empty.
          AmskvError: if the checkpoint has no text encoder, or features are another encoder's.

        Warns:
          PromptCutWarning: if a text is too long.
        """
        if isinstance(wanted, TextFeatures):
            return self._checked(wanted)
        if isinstance(wanted, str):
            wanted = [wanted]
        texts = wanted if isinstance(wanted, Texts) else Texts(tuple(wanted))
        if not texts.prompts or not all(isinstance(prompt, str) for prompt in texts.prompts):
            raise UsageError(f"expected one or more prompts, found {wanted!r}")
        encoder = load_text_encoder(self.place, self.dtype, mesh=self.mesh)
        return encoder(texts.prompts, texts.negative or None)

    def _checked(self, features: TextFeatures) -> TextFeatures:
        own = read_info(self.place).fingerprints.get(PART, "")
        if own and features.encoder and own != features.encoder:
            raise AmskvError(
                "the text features were made by another text encoder than the checkpoint's: encode "
                "the prompts again with `amskv encode`"
            )
        return features


def load_text_encoder(
    place: str | os.PathLike[str],
    dtype: str | None = None,
    batch: int = 8,
    mesh: MeshShape | None = None,
) -> TextEncoder:
    """Load the text encoder of a checkpoint, and nothing else of it.

    Args:
      place: of the checkpoint.
      dtype: "float32" or "bfloat16"; None takes the one in which the weights are stored.
      batch: prompts encoded at once.
      mesh: devices which share the encoder.

    Raises:
      AmskvError: if the checkpoint has none.
    """
    info = read_info(place)
    config = info.model.parts.get(PART)
    if not isinstance(config, T5Config):
        raise AmskvError(
            f"{place} holds no text encoder: convert it again with --text-encoder, or give the "
            "features of prompts with --text-features"
        )
    checkpoint = load_checkpoint(place, dtype, (PART,), mesh)
    return TextEncoder(
        config=config,
        params=checkpoint.params[PART],
        tokenizer=PromptTokenizer(read_file(place, TOKENIZER_FILE)),
        fingerprint=info.fingerprints.get(PART, ""),
        dtype=dtype or info.dtype,
        batch=batch,
    )
