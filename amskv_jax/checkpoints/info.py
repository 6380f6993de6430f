"""What a checkpoint says about itself, and how this is written down."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from amskv_jax.errors import AmskvError
from amskv_jax.models.guidance import Drawing
from amskv_jax.models.kinds import KINDS, find_kind, make_model, optional_parts, part_types
from amskv_jax.models.parts import config_from_json
from amskv_jax.models.protocol import Model

FORMAT = "amskv-jax checkpoint"
VERSION = 2
READABLE = (1, 2)
"""Versions that are read. Version 1 had one fingerprint, one tree of weights, and no drawing."""

LARGEST_NUMBER = 4096
"""Numbers of a configuration up to this one need not be a side of a stored parameter."""
LARGEST_SCHEDULE = 2**20
"""Tokens of all scales: a hundred times those of a picture of 1024 pixels."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    Attributes:
      model: kind and shape of the model; without the parts that the checkpoint lacks.
      dtype: "float32" or "bfloat16", how the weights are stored.
      fingerprint: of the parts which every model of this kind has, see ``weights.Fingerprint``:
        layer statistics name it.
      fingerprints: of every part; none in checkpoints of version 1.
      classes: names of the classes of a class-conditional model; none if they are not known.
      drawing: how the model is drawn from unless a user says otherwise.
      files: names of small files which a part needs besides its weights.
    """

    model: Model
    dtype: str
    fingerprint: str
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    drawing: Drawing = field(default_factory=Drawing)
    files: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of the model, a key of ``KINDS``."""
        return self.model.kind

    @property
    def configs(self) -> Mapping[str, Any]:
        """The configuration of every part that is there."""
        return self.model.parts


def check_classes(model: Model, classes: Sequence[str]) -> None:
    """Raise an AmskvError unless there are no names of classes, or one for every class."""
    expected = getattr(model.parts["transformer"], "num_classes", 0)
    if len(classes) not in (0, expected):
        raise AmskvError(
            f"there are {len(classes)} names of classes, but the transformer has {expected} "
            "classes: give one name for each"
        )


def info_to_json(info: CheckpointInfo) -> str:
    """Return what ``info_from_json`` reads."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "kind": info.kind,
        "configs": {part: asdict(config) for part, config in info.configs.items()},
        "dtype": info.dtype,
        "fingerprint": info.fingerprint,
        "fingerprints": dict(info.fingerprints),
        "classes": info.classes,
        "drawing": asdict(info.drawing),
        "files": info.files,
    }
    return json.dumps(content, indent=2) + "\n"


def parse_info(text: str, source: str) -> dict[str, Any]:
    """Return the fields of what ``info_to_json`` wrote, not yet looked at any further.

    Raises:
      AmskvError: if it is of another program or of a newer version, or no JSON.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AmskvError(f"{source} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise AmskvError(f"{source}: this is not a checkpoint of this package")
    if content.get("version") not in READABLE or content.get("kind") not in list(KINDS):
        raise AmskvError(
            f"{source}: this is a checkpoint of version {content.get('version')} and kind "
            f"{content.get('kind')!r}, expected version {' or '.join(map(str, READABLE))} and "
            f"kind {' or '.join(KINDS)}: it needs another version of this package"
        )
    return content


def info_from_json(content: Mapping[str, Any], source: str, largest: int) -> CheckpointInfo:
    """Return what the fields of ``parse_info`` say.

    Args:
      content: the fields.
      source: where they were read, for messages.
      largest: the longest side of any parameter that is stored. Numbers far above it cannot belong
        to the weights, and nothing is to be built with them.

    Raises:
      AmskvError: if they are damaged, or describe no model.
    """
    try:
        kind = find_kind(content["kind"])
        optional = optional_parts(kind)
        configs: dict[str, Any] = {}
        for part, config_type in part_types(kind).items():
            if part in optional and part not in content["configs"]:
                continue
            check_numbers(content["configs"][part], max(largest, LARGEST_NUMBER), source, part)
            configs[part] = config_from_json(config_type, content["configs"][part])
        drawing = _drawing(content, kind)
        fingerprints = content.get("fingerprints", {})
        texts = {part: str(fingerprints[part]) for part in (fingerprints and configs)}
        info = CheckpointInfo(
            make_model(content["kind"], configs),
            content["dtype"],
            str(content["fingerprint"]),
            texts,
            tuple(content.get("classes", ())),  # earlier checkpoints do not have it
            drawing,
            tuple(map(str, content.get("files", ()))),
        )
    except AmskvError:
        raise
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise AmskvError(f"{source} is damaged: {error!r}") from error
    if info.model.schedule.total > LARGEST_SCHEDULE:
        raise AmskvError(f"{source} is damaged: its scales have {info.model.schedule.total} tokens")
    check_classes(info.model, info.classes)
    return info


def check_numbers(content: Any, largest: int, source: str, name: str) -> None:
    """Raise an AmskvError if a number of a configuration is not finite, or above ``largest``.

    Args:
      content: what JSON holds.
      largest: see ``info_from_json``.
      source: where it was read, for the message.
      name: of the content, for the message.
    """
    if isinstance(content, Mapping):
        for key, value in content.items():
            check_numbers(value, largest, source, f"{name}/{key}")
    elif isinstance(content, list):
        check_numbers(len(content), largest, source, f"the length of {name}")
        for value in content:
            check_numbers(value, largest, source, name)
    elif isinstance(content, int | float) and not abs(content) <= largest:
        problem = (
            "is not finite"
            if isinstance(content, float) and not math.isfinite(content)
            else (f"is {content}, which the sizes of its parameters allow up to {largest}")
        )
        raise AmskvError(f"{source} does not belong to the weights beside it: {name} {problem}")


def _drawing(content: Mapping[str, Any], kind: type[Model]) -> Drawing:
    if "drawing" in content:
        return config_from_json(Drawing, content["drawing"])
    # Of version 1, which knew the strength alone; the earliest not even that.
    return replace(kind.drawing, cfg=float(content.get("guidance", kind.drawing.cfg)))
