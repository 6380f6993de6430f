"""What a checkpoint says about itself, and how this is written down."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from amskv_jax.errors import AmskvError
from amskv_jax.models.guidance import Drawing
from amskv_jax.models.var.config import VARConfig, VQVAEConfig
from amskv_jax.models.var.model import VARModel
from amskv_jax.schedule import ScaleSchedule

FORMAT = "amskv-jax checkpoint"
VERSION = 1

GUIDANCE = 1.5
"""Strength of classifier-free guidance with which VAR's authors draw: what suits most models."""

PartConfig = VARConfig | VQVAEConfig
KINDS: dict[str, dict[str, type[PartConfig]]] = {
    "var": {"transformer": VARConfig, "tokenizer": VQVAEConfig}
}
"""The parts of a checkpoint of every kind."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    Attributes:
      kind: a key of ``KINDS``.
      configs: the shape of every part.
      dtype: "float32" or "bfloat16", how the weights are stored.
      fingerprint: see ``checkpoint.fingerprint``.
      classes: names of the classes of a class-conditional model; none if they are not known.
      guidance: strength of classifier-free guidance that suits the model.
    """

    kind: str
    configs: dict[str, PartConfig]
    dtype: str
    fingerprint: str
    classes: tuple[str, ...] = ()
    guidance: float = GUIDANCE

    @property
    def model(self) -> VARModel:
        """The model's shape."""
        return VARModel(**self.configs)  # type: ignore[arg-type]

    @property
    def drawing(self) -> Drawing:
        """How pictures are drawn unless a user says otherwise."""
        return Drawing(cfg=self.guidance)


def check_configs(configs: Mapping[str, PartConfig]) -> None:
    """Raise an AmskvError if a transformer and a tokenizer do not belong together."""
    transformer, tokenizer = configs["transformer"], configs["tokenizer"]
    for name, what in (
        ("vocab_size", "codes"),
        ("latent_channels", "channels per code"),
        ("schedule", "as sides of the token maps"),
    ):
        ours, theirs = getattr(transformer, name), getattr(tokenizer, name)
        if ours != theirs:
            raise AmskvError(
                f"transformer and tokenizer do not belong together: the transformer has {ours} "
                f"{what}, the tokenizer {theirs}"
            )


def check_classes(configs: Mapping[str, PartConfig], classes: Sequence[str]) -> None:
    """Raise an AmskvError unless there are no names of classes, or one for every class."""
    transformer = configs["transformer"]
    if isinstance(transformer, VARConfig) and len(classes) not in (0, transformer.num_classes):
        raise AmskvError(
            f"there are {len(classes)} names of classes, but the transformer has "
            f"{transformer.num_classes} classes: give one name for each"
        )


def kind_of(configs: Mapping[str, PartConfig]) -> str:
    """Return the kind of checkpoint which has these parts.

    Raises:
      AmskvError: if there is none.
    """
    types = {part: type(config) for part, config in configs.items()}
    for kind, parts in KINDS.items():
        if parts == types:
            return kind
    raise AmskvError(f"no kind of checkpoint has the parts {', '.join(types)}")


def info_to_json(info: CheckpointInfo) -> str:
    """Return what ``info_from_json`` reads."""
    content = {"format": FORMAT, "version": VERSION, **asdict(info)}
    return json.dumps(content, indent=2) + "\n"


def info_from_json(text: str, source: str) -> CheckpointInfo:
    """Read what ``info_to_json`` wrote.

    Args:
      text: what was read.
      source: from where, for messages.

    Raises:
      AmskvError: if it is of another program, of a newer version, or damaged.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise AmskvError(f"{source} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise AmskvError(f"{source}: this is not a checkpoint of this package")
    if content.get("version") != VERSION or content.get("kind") not in KINDS:
        raise AmskvError(
            f"{source}: this is a checkpoint of version {content.get('version')} and kind "
            f"{content.get('kind')!r}, expected version {VERSION} and kind "
            f"{' or '.join(KINDS)}: it needs another version of this package"
        )
    try:
        configs = {
            part: config_from_json(config_type, content["configs"][part])
            for part, config_type in KINDS[content["kind"]].items()
        }
        info = CheckpointInfo(
            content["kind"],
            configs,
            content["dtype"],
            content["fingerprint"],
            # Checkpoints of earlier versions say neither.
            tuple(content.get("classes", ())),
            float(content.get("guidance", GUIDANCE)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AmskvError(f"{source} is damaged: {error!r}") from error
    check_configs(configs)
    check_classes(configs, info.classes)
    return info


def config_from_json(config_type: type[PartConfig], content: dict[str, Any]) -> PartConfig:
    """Return the dataclass of which ``content`` holds the fields.

    Raises:
      KeyError, TypeError or ValueError: if they are not those of the dataclass.
    """
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }
    fields["schedule"] = ScaleSchedule(tuple(map(tuple, content["schedule"]["grids"])))
    return config_type(**fields)
