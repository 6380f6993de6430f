"""The model card of a checkpoint that is pushed: the README of its repository on the hub."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from amskv_jax.checkpoints.info import CheckpointInfo
from amskv_jax.models.kinds import param_shapes

MARK = "<!-- Written by `amskv push`; without this line, a later push leaves this file alone. -->"


def model_card(
    repo: str,
    info: CheckpointInfo,
    *,
    packed: bool = False,
    stats: Sequence[str] = (),
    plans: Sequence[str] = (),
    license: str = "",
) -> str:
    """Return the text of a model card, Markdown after metadata in YAML.

    Args:
      repo: "user/repository".
      info: what the checkpoint says about itself.
      packed: whether it is a packed checkpoint.
      stats: paths of layer statistics in the repository.
      plans: paths of retention plans in the repository.
      license: the hub's name of the weights' licence, such as "mit"; empty if it is not known.
    """
    model, schedule = info.model, info.model.schedule
    height, width = model.picture_size(schedule)
    metadata = ["library_name: amskv-jax", "tags:"]
    metadata += [f"- {tag}" for tag in ("jax", "flax", "image-generation", info.kind)]
    if license:
        metadata.insert(0, f"license: {license}")
    stored = "8-bit kernels, float16 convolutions" if packed else info.dtype
    drawing = ", ".join(f"{f.name} {getattr(info.drawing, f.name)}" for f in fields(info.drawing))
    lines = [
        "---",
        *metadata,
        "---",
        MARK,
        f"# {repo.partition('/')[2]}",
        "",
        f"A next-scale image model of the kind {info.kind} for amskv_jax, which draws with a "
        "key/value cache that keeps only what matters.",
        "",
        "```python",
        "import amskv_jax as amskv",
        "",
        f'pipe = amskv.load("hf://{repo}")',
        "```",
        "",
        "```sh",
        f"amskv info --checkpoint hf://{repo}",
        f"amskv sample --checkpoint hf://{repo} --policy ams",
        "```",
        "",
        "## Model",
        "",
        f"- Pictures of {height} x {width} pixels; token maps {schedule}, {schedule.total} tokens.",
        f"- Weights: {stored}; fingerprint `{info.fingerprint}`.",
        f"- Drawn with, unless asked otherwise: {drawing}.",
    ]
    if info.classes:
        lines.append(f"- Classes: {_some(info.classes)}.")
    lines += ["", "| part | parameters | shape |", "|---|---:|---|"]
    lines += [f"| {part} | {_parameters(c)} | {_shape(c)} |" for part, c in info.configs.items()]
    if stats or plans:
        lines += ["", "## Statistics and plans", ""]
    lines += [f"- `--stats hf://{repo}/{path}`: layer statistics of this model." for path in stats]
    lines += [f"- `--plan hf://{repo}/{path}`: what a cache keeps." for path in plans]
    return "\n".join(lines) + "\n"


def _parameters(config: Any) -> str:
    count = sum(math.prod(shape) for shape in param_shapes(config).values())
    return f"{count / 1e6:.2f} M"


def _shape(config: Any) -> str:
    """Return the numbers of a configuration; the schedule is said elsewhere."""
    values = ((field.name, getattr(config, field.name)) for field in fields(config))
    return ", ".join(f"{name} {value}" for name, value in values if name != "schedule")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return f"{shown}, and {len(names) - 20} more" if len(names) > 20 else shown
