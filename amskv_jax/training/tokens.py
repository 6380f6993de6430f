"""The tokens of a whole set of pictures, made once, from which a VAR is trained."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.lax import Precision
from rich.progress import track

from amskv_jax.files import replacing
from amskv_jax.models.var.config import VQVAEConfig
from amskv_jax.models.var.vqvae import VQVAE
from amskv_jax.resize import resize
from amskv_jax.training.data import Pictures
from amskv_jax.training.tokenizer import unit_range


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Tokens of several versions of every picture.

    Attributes:
      target: what the transformer shall predict, [copies, N, total], of the smallest unsigned type.
      history: what it sees of the earlier scales, like ``target``; equal to it without noise.
      labels: int32 [N].
      classes: names of the classes.
    """

    target: np.ndarray
    history: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def copies(self) -> int:
        """Versions of every picture."""
        return len(self.target)

    def save(self, path: Path | str) -> None:
        """Write an ``.npz`` file, which is there whole or not at all."""
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                target=self.target,
                history=self.history,
                labels=self.labels,
                classes=np.array(self.classes),
            )

    @classmethod
    def load(cls, path: Path | str) -> "TokenSet":
        """Read what ``save`` wrote."""
        with np.load(path) as file:
            classes = tuple(str(name) for name in file["classes"])
            return cls(file["target"], file["history"], file["labels"], classes)


def tokenize(
    config: VQVAEConfig,
    params: Any,
    pictures: Pictures,
    *,
    copies: int = 2,
    noise: float = 0.0,
    seed: int = 0,
    dtype: str = "float32",
    batch_size: int = 500,
) -> TokenSet:
    """Turn pictures into tokens; every other copy is mirrored.

    Args:
      config: shape of the VQVAE.
      params: its weights.
      pictures: of its size.
      copies: versions of every picture; beyond two they differ by noise alone.
      noise: largest strength of the noise, see ``noisy_tokens``; that of every picture and copy is
        drawn evenly between 0 and this.
      seed: of the noise.
      dtype: in which the encoder computes.
      batch_size: pictures at a time.

    Raises:
      AmskvError: if the pictures have another size than the model's.
    """
    pictures.check(config.picture_size)
    module = VQVAE(config, dtype)

    @jax.jit
    def encode(params: Any, pixels: jax.Array, key: jax.Array, mirrored: jax.Array) -> Any:
        keys = jax.random.split(key)
        strength = jax.random.uniform(keys[0], (len(pixels),), maxval=noise)
        images = unit_range(jnp.where(mirrored, pixels[:, :, ::-1], pixels))

        def run(module: VQVAE) -> tuple[jax.Array, jax.Array]:
            latent = module.encode_features(images)
            if noise == 0:
                tokens, _ = module.quantize(latent)
                return tokens, tokens
            codebook = params["quantizer"]["codebook"]
            return noisy_tokens(module, codebook, latent, strength, keys[1])

        return module.apply({"params": params}, method=run)

    total = config.schedule.total
    kind = np.min_scalar_type(config.vocab_size - 1)
    target = np.empty((copies, len(pictures), total), kind)
    history = np.empty_like(target) if noise else target
    starts = [
        (copy, start) for copy in range(copies) for start in range(0, len(pictures), batch_size)
    ]
    for copy, start in track(starts, "tokens"):
        rows = slice(start, start + batch_size)
        key = jax.random.fold_in(jax.random.key(seed), copy * len(pictures) + start)
        tokens = encode(params, pictures.pixels[rows], key, copy % 2 == 1)
        target[copy, rows], history[copy, rows] = tokens
    return TokenSet(target, history, pictures.labels, pictures.classes)


def kept_tokens(
    path: Path,
    config: VQVAEConfig,
    params: Any,
    pictures: Pictures,
    *,
    copies: int,
    noise: float = 0.0,
) -> TokenSet:
    """Return what ``tokenize`` makes, from the file at ``path`` if it was made of the same before.

    Beside the file stands another, .key, with a digest of all that the tokens depend on.

    Raises:
      AmskvError: if the pictures have another size than the model's.
    """
    digest = hashlib.sha256(repr((config, copies, noise, pictures.classes)).encode())
    for name, leaf in sorted(flatten_dict(params, sep="/").items()):
        digest.update(name.encode())
        digest.update(np.asarray(leaf).tobytes())
    digest.update(pictures.pixels.tobytes())
    digest.update(pictures.labels.tobytes())
    key = path.with_suffix(".key")
    if path.exists() and key.exists() and key.read_text() == digest.hexdigest():
        return TokenSet.load(path)
    key.unlink(missing_ok=True)  # first, so that it never stands beside other tokens
    tokens = tokenize(config, params, pictures, copies=copies, noise=noise)
    tokens.save(path)
    key.write_text(digest.hexdigest())
    return tokens


def noisy_tokens(
    module: VQVAE, codebook: jax.Array, latent: jax.Array, strength: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Quantise latents such that later scales make up for errors of earlier ones.

    At every scale the history takes an entry drawn with probability proportional to
    exp(-distance^2 / temperature), the target is the nearest entry, and the next scale describes
    what the history has left over. A transformer trained on these learns to mend its own errors
    instead of never having seen any (stochastic codes of RQ-Transformer, arXiv 2203.01941;
    self-correction of Infinity, arXiv 2412.04431).

    Args:
      module: the VQVAE, bound to its weights.
      codebook: its codebook [V, C].
      latent: [B, h, w, C].
      strength: [B], the temperature over the mean squared distance to the nearest entries; 0 for
        no noise.
      key: of the noise.

    Returns:
      Target and history, int32 [B, total].
    """
    f_hat = jnp.zeros_like(latent)
    targets, histories = [], []
    for scale, grid in enumerate(module.config.schedule.grids):
        vectors = resize(latent - f_hat, grid, "area").reshape(len(latent), -1, latent.shape[-1])
        products = jnp.einsum("btc,vc->btv", vectors, codebook, precision=Precision.HIGHEST)
        squares = jnp.sum(vectors**2, -1, keepdims=True) + jnp.sum(codebook**2, -1)[None, None]
        distance = squares - 2 * products
        temperature = strength * distance.min(-1).mean(-1)
        gumbel = jax.random.gumbel(jax.random.fold_in(key, scale), distance.shape)
        drawn = jnp.argmin(distance - temperature[:, None, None] * gumbel, axis=-1)
        targets.append(jnp.argmin(distance, axis=-1))
        histories.append(drawn)
        f_hat = module.accumulate(f_hat, module.embed(drawn), scale)
    return jnp.concatenate(targets, axis=1), jnp.concatenate(histories, axis=1)
