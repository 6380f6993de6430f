"""A small classifier, trained from scratch: evaluation looks at its features and classes.

It is a wide residual network (arXiv 1605.07146). The running moments of its batch normalisation are
kept beside the weights, {"params": ..., "batch_stats": ...}, and averaged like them.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax

from amskv_jax.training.config import Optimization, Run
from amskv_jax.training.data import Pictures, draw_pictures
from amskv_jax.training.loop import Figures, Task, fit
from amskv_jax.training.state import TrainState, apply_gradients, create_state
from amskv_jax.training.tokenizer import unit_range

OPTIMIZATION = Optimization(
    learning_rate=0.4, warmup_steps=970, method="sgd", weight_decay=5e-4, clip_norm=5.0
)
RUN = Run(steps=9700, batch_size=512, steps_per_call=97, checkpoint_every=970)
MOMENTUM = 0.9
"""Decay of the running moments of batch normalisation."""
EVALUATED_AT_ONCE = 500
"""Pictures per call when the classifier is only applied."""


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of a wide residual network: WRN-(6 blocks + 4)-width.

    Attributes:
      num_classes: classes.
      width: factor of the channels 16, 32, 64 of the three stages.
      blocks: residual blocks per stage.
    """

    num_classes: int
    width: int = 4
    blocks: int = 2

    @property
    def dimension(self) -> int:
        """Number of features."""
        return 64 * self.width


@dataclass(frozen=True)
class ClassifierTraining:
    """How a classifier is trained; the defaults suit CIFAR-10.

    Attributes:
      model: its shape.
      optimization: see there.
      run: see there.
      label_smoothing: probability that is spread over all classes.
      shift: pixels by which pictures are moved at most, after padding by reflection.
      cutout: side of the square that is blanked out in every picture (arXiv 1708.04552).
    """

    model: ClassifierConfig
    optimization: Optimization = OPTIMIZATION
    run: Run = RUN
    label_smoothing: float = 0.1
    shift: int = 4
    cutout: int = 8


class Classifier(nn.Module):
    """Maps pictures [B, H, W, 3] in [-1, 1] to features [B, D] and logits [B, classes], float32."""

    config: ClassifierConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, pictures: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Return features, which are the last activations averaged over all places, and logits.

        With ``train``, batches are normalised by their own moments, and the running ones updated.
        """
        config = self.config
        x = self._conv(16)(pictures.astype(self.dtype))
        for stage in range(3):
            for block in range(config.blocks):
                stride = 2 if stage and not block else 1
                x = self._block(x, 16 * 2**stage * config.width, stride, train)
        features = self._activate(x, train).mean((1, 2), dtype=jnp.float32)
        return features, nn.Dense(config.num_classes)(features)

    def _block(self, x: jax.Array, channels: int, stride: int, train: bool) -> jax.Array:
        active = self._activate(x, train)
        if x.shape[-1] != channels or stride > 1:
            x = self._conv(channels, stride, size=1)(active)
        active = self._activate(self._conv(channels, stride)(active), train)
        return x + self._conv(channels)(active)

    def _activate(self, x: jax.Array, train: bool) -> jax.Array:
        norm = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, dtype=self.dtype)
        return nn.relu(norm(x))

    def _conv(self, channels: int, stride: int = 1, size: int = 3) -> nn.Conv:
        return nn.Conv(
            channels,
            (size, size),
            stride,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.he_normal(),
        )


def train_classifier(
    config: ClassifierTraining,
    pictures: Pictures,
    directory: Path | str,
    *,
    validation: Pictures | None = None,
    stop_after: float | None = None,
) -> Any:
    """Train a classifier, or go on with the run in ``directory``.

    The log holds loss and accuracy on the varied pictures, and with every checkpoint the accuracy
    of the averaged weights on the validation pictures as they are.

    Args:
      config: all settings.
      pictures: to train on.
      directory: of the run, see ``training.loop``.
      validation: held-out pictures.
      stop_after: see ``training.loop.fit``.

    Returns:
      The averaged weights and moments, float32: the classifier's variables.

    Raises:
      AmskvError: if the pictures do not suit the model; and what ``training.loop.fit`` raises.
    """
    size: tuple[int, int] = pictures.pixels.shape[1:3]
    for data in (pictures, validation):
        if data is not None:
            data.check(size, config.model.num_classes)
    run = config.run

    def create() -> TrainState:
        empty = jnp.zeros((1, *size, 3))
        variables = Classifier(config.model).init(jax.random.key(run.seed), empty)
        return create_state(variables, config.optimization, run, {})

    def batches(first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        shape = count, run.batch_size
        index = draw_pictures(
            len(pictures), run.seed, first * run.batch_size, count * run.batch_size
        ).rows
        pixels = pictures.pixels[index]
        return pixels.reshape(*shape, *pixels.shape[1:]), pictures.labels[index].reshape(shape)

    def evaluate(ema: Any) -> Figures:
        assert validation is not None
        _, logits = apply_classifier(config.model, ema, validation.pixels)
        accuracy = (logits.argmax(1) == validation.labels).mean()
        return {"validation_accuracy": jnp.asarray(accuracy)}

    task = Task(
        name="classifier",
        run=run,
        settings=config,
        create=create,
        step=partial(train_step, config),
        batches=batches,
        evaluate=None if validation is None else evaluate,
    )
    return fit(task, directory, stop_after).ema


def train_step(
    config: ClassifierTraining, state: TrainState, batch: tuple[jax.Array, jax.Array]
) -> tuple[TrainState, Figures]:
    """Make one optimiser step on pictures uint8 [B, H, W, 3] and labels [B]."""
    pixels, labels = batch
    key = jax.random.fold_in(jax.random.key(config.run.seed), state.step)
    pictures = vary(config, key, unit_range(pixels))
    classes = config.model.num_classes
    targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), config.label_smoothing)

    model: Any = Classifier(config.model, config.run.dtype)

    def objective(variables: Any) -> tuple[jax.Array, tuple[Figures, Any]]:
        (_, logits), updated = model.apply(variables, pictures, True, mutable="batch_stats")
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        figures = {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}
        return loss, (figures, updated)

    (_, (figures, updated)), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
    state, own = apply_gradients(state, gradients, config.optimization, config.run)
    # Moments have no gradient, so the optimiser left them alone.
    return replace(state, params={**state.params, **updated}), {**figures, **own}


def vary(config: ClassifierTraining, key: jax.Array, pictures: jax.Array) -> jax.Array:
    """Return pictures [B, H, W, 3] mirrored, shifted and with a square cut out, at random each."""
    batch, height, width, _ = pictures.shape
    keys = jax.random.split(key, 3)
    mirrored = jax.random.bernoulli(keys[0], shape=(batch, 1, 1, 1))
    pictures = jnp.where(mirrored, pictures[:, :, ::-1], pictures)
    shift = config.shift
    padded = jnp.pad(pictures, ((0, 0), (shift, shift), (shift, shift), (0, 0)), "reflect")
    corners = jax.random.randint(keys[1], (batch, 2), 0, 2 * shift + 1)

    def crop(picture: jax.Array, corner: jax.Array) -> jax.Array:
        return lax.dynamic_slice(picture, (corner[0], corner[1], 0), (height, width, 3))

    pictures = jax.vmap(crop)(padded, corners)
    top, left = jax.random.randint(
        keys[2], (2, batch, 1, 1, 1), 0, jnp.array([height, width])[:, None, None, None, None]
    )
    row = jnp.arange(height)[None, :, None, None]
    column = jnp.arange(width)[None, None, :, None]
    half = config.cutout // 2
    inside = (
        (row >= top - half) & (row < top + half) & (column >= left - half) & (column < left + half)
    )
    return jnp.where(inside, 0.0, pictures)


def apply_classifier(
    config: ClassifierConfig, params: Any, pixels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return features [N, D] and logits [N, classes] of pictures uint8 [N, H, W, 3], float32."""
    parts = [
        _apply(config, params, pixels[start : start + EVALUATED_AT_ONCE])
        for start in range(0, len(pixels), EVALUATED_AT_ONCE)
    ]
    features, logits = zip(*parts, strict=True)
    return np.concatenate(features), np.concatenate(logits)


@partial(jax.jit, static_argnums=0)
def _apply(config: ClassifierConfig, params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Features shall not depend on the device, and GPUs round float32 products unless told.
    with jax.default_matmul_precision("highest"):
        model: Any = Classifier(config)  # Flax's type of `apply` says little
        features, logits = model.apply(params, unit_range(pixels))
    return features, logits
