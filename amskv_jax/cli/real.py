"""Real pictures for commands that predict them, with what they show."""

from pathlib import Path
from typing import TYPE_CHECKING

from amskv_jax.cli.console import progress
from amskv_jax.cli.wanted import conditions_of
from amskv_jax.errors import AmskvError

if TYPE_CHECKING:
    import numpy as np

    from amskv_jax.models.protocol import Conditions
    from amskv_jax.pipeline import Pipeline


def real_pictures(
    pipe: "Pipeline",
    path: Path,
    count: int,
    *,
    crop: bool = False,
    prompts: Path | None = None,
    text_features: Path | None = None,
) -> tuple["np.ndarray", "Conditions", int]:
    """Return pictures spread evenly over all there are, what they show, and how many there are.

    Args:
      pipe: the model, without weights.
      path: of the pictures, see ``training.data.load_pictures``.
      count: the most to return.
      crop: whether to scale and crop pictures of another size.
      prompts: what all the pictures show, for models that draw prompts.
      text_features: likewise.

    Returns:
      Pictures uint8 [N, H, W, 3], their conditions, and the number of all.

    Raises:
      AmskvError: if there are not as many texts as pictures, or other classes than the model's.
    """
    import numpy as np  # noqa: PLC0415

    from amskv_jax.drawing import Chosen  # noqa: PLC0415
    from amskv_jax.training.data import load_pictures  # noqa: PLC0415

    with progress("reading pictures"):
        pictures = load_pictures(path, pipe.model.picture_size(pipe.schedule), crop)
    total = len(pictures)
    count = min(count, total)
    chosen = np.arange(count) * total // count  # those of a class may lie together
    texts = conditions_of(pipe, prompts=prompts, text_features=text_features)
    if pipe.model.takes == "classes":
        pictures.check(pipe.model.picture_size(pipe.schedule), len(pipe.conditions(None)))
        return pictures.pixels[chosen], pipe.conditions(pictures.labels[chosen]), total
    assert texts is not None, "of a model that draws prompts"
    if len(texts) != total:
        raise AmskvError(
            f"there are {len(texts)} prompts for {total} pictures: expected one for each"
        )
    return pictures.pixels[chosen], Chosen(texts, tuple(chosen.tolist())), total
