"""Options that say what to draw, in which shape, and how; readers of their values."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amskv_jax.cli.console import progress
from amskv_jax.cli.options import Dtype, ProductDtype, parse_numbers
from amskv_jax.errors import AmskvError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from amskv_jax.models.guidance import Drawing, PerScale
    from amskv_jax.models.protocol import Conditions
    from amskv_jax.pipeline import Pipeline

LabelsOption = Annotated[
    str | None,
    typer.Option(
        "--labels", help="Classes to draw, of class-conditional models.", metavar="207,360 or 0-9"
    ),
]
PromptOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="Text to draw, of text-to-image models; may be given again."),
]
NegativePromptOption = Annotated[
    list[str] | None,
    typer.Option(
        "--negative-prompt", help="What to keep away from: one text, or one for every prompt."
    ),
]
PromptsOption = Annotated[
    Path | None, typer.Option("--prompts", help="File of prompts, one in a line.")
]
TextFeaturesOption = Annotated[
    Path | None,
    typer.Option("--text-features", help="Features of prompts (.npz), made by `amskv encode`."),
]
AspectOption = Annotated[
    str | None,
    typer.Option(
        "--aspect",
        help="Aspect ratio, for models that draw several: width:height, or height / width.",
        metavar="16:9 or 0.571",
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option("--size", help="Size, for models that draw several.", metavar="1M or 0.25M"),
]
CfgOption = Annotated[
    str | None,
    typer.Option(
        "--cfg",
        help="Guidance strength, or one for every scale; what suits the model if not given. None: "
        "VAR 0, Infinity 1.",
        metavar="4 or 1,2,...",
    ),
]
TauOption = Annotated[
    str | None,
    typer.Option(
        "--tau", help="Temperature of the logits, or one for every scale.", metavar="0.5 or 1,1,..."
    ),
]
GuideOption = Annotated[
    str | None,
    typer.Option(
        "--guide",
        help="Where guidance acts: on the logits, and at the output of the n-th block from the "
        "end, -n.",
        metavar="logits,-4",
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        min=0,
        help="Draw from the k likeliest tokens; 0: all, 1: greedy; what suits the model if not "
        "given.",
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        min=0,
        max=1,
        help="Draw from tokens of this probability in total; 0: all; what suits the model if not "
        "given.",
    ),
]


def drawing_of(
    base: "Drawing",
    *,
    cfg: str | None = None,
    tau: str | None = None,
    guide: str | None = None,
    **others: Any,
) -> "Drawing":
    """Return how to draw.

    Args:
      base: what holds where an option is not given.
      cfg: of the option.
      tau: of the option.
      guide: of the option.
      **others: further fields of ``Drawing``, None where not given.

    Raises:
      UsageError: if a value cannot be read.
    """
    given = {
        "cfg": None if cfg is None else _numbers(cfg, "--cfg"),
        "tau": None if tau is None else _numbers(tau, "--tau"),
        "guide": None if guide is None else _places(guide),
        **others,
    }
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def as_wanted(
    pipe: "Pipeline",
    *,
    aspect: str | None,
    size: str | None,
    cache_dtype: str | None = None,
    **drawing: Any,
) -> "Pipeline":
    """Return a pipeline that draws what shape, and how, the options say.

    Args:
      pipe: what holds where an option is not given.
      aspect: of the option.
      size: of the option.
      cache_dtype: of the option.
      **drawing: see ``drawing_of``.

    Raises:
      UsageError: if a value cannot be read, the model has no such shape, or cannot draw so.
    """
    wanted = replace(
        pipe,
        schedule=pipe.model.find_schedule(aspect, size),
        cache_dtype=cache_dtype,
        drawing=drawing_of(pipe.drawing, **drawing),
    )
    wanted.controls()  # before prompts are encoded, which takes long
    wanted.model.guidance(wanted.drawing)
    return wanted


def open_checkpoint(
    place: Path, dtype: Dtype | ProductDtype | None, mesh: str | None = None, **options: Any
) -> "Pipeline":
    """Return a checkpoint without its weights, for what the options ask for.

    Args:
      place: the checkpoint.
      dtype: of the option.
      mesh: of the option.
      **options: see ``as_wanted``.
    """
    from amskv_jax.mesh import MeshShape  # noqa: PLC0415
    from amskv_jax.pipeline import load  # noqa: PLC0415

    numbers = dtype.value if dtype else None
    pipe = load(place, numbers, weights=False, mesh=MeshShape.parse(mesh))
    return as_wanted(pipe, **options)


def known_pipeline(name: str, dtype: Dtype | ProductDtype) -> "Pipeline":
    """Return a known model, which has no weights."""
    from amskv_jax import configs  # noqa: PLC0415
    from amskv_jax.pipeline import Pipeline  # noqa: PLC0415

    model = configs.get(name).model
    return Pipeline(model, None, model.schedule, dtype.value, model.drawing)


def check_low_memory(pipe: "Pipeline") -> None:
    """Raise a UsageError if ``--low-memory`` does not go with what else is asked for."""
    from amskv_jax.precision import FLOAT8  # noqa: PLC0415

    if pipe.mesh:
        raise UsageError("--low-memory is for one device: leave out --mesh")
    if pipe.dtype in FLOAT8:
        raise UsageError(
            "--low-memory keeps weights in 8 bits of another kind: leave it out, or take "
            "--dtype bfloat16"
        )


def with_weights(pipe: "Pipeline", place: Path) -> "Pipeline":
    """Return the pipeline with the weights of its checkpoint."""
    from amskv_jax.pipeline import load_weights  # noqa: PLC0415

    with progress("loading weights"):
        return replace(pipe, params=load_weights(place, pipe.dtype, pipe.mesh, pipe.low_memory))


def conditions_of(
    pipe: "Pipeline",
    *,
    labels: str | None = None,
    prompt: Sequence[str] | None = (),
    negative_prompt: Sequence[str] | None = None,
    prompts: Path | None = None,
    text_features: Path | None = None,
) -> "Conditions | None":
    """Return what the options ask for; None if they ask nothing of a model that draws classes.

    Args:
      pipe: what draws.
      labels: of the option.
      prompt: of the option; empty for commands without it.
      negative_prompt: of the option.
      prompts: of the option.
      text_features: of the option.

    Raises:
      AmskvError: if they do not fit together, or the model cannot draw it.
    """
    given = {
        "--labels": labels,
        "--prompt": prompt,
        "--prompts": prompts,
        "--text-features": text_features,
    }
    named = [name for name, value in given.items() if value]
    if len(named) > 1:
        raise UsageError(f"give one of {', '.join(given)}, not {' and '.join(named)}")
    if negative_prompt and named not in (["--prompt"], ["--prompts"]):
        raise UsageError("--negative-prompt needs --prompt or --prompts")
    asked = "classes" if named == ["--labels"] else "prompts"
    if named and asked != pipe.model.takes:
        raise UsageError(f"the model draws {pipe.model.takes}, not {asked}: leave out {named[0]}")
    if labels is not None:
        return pipe.conditions(parse_numbers(labels, "--labels"))
    if not named and pipe.model.takes == "prompts":
        one = "--prompt, " if prompt != () else ""
        raise UsageError(f"nothing to draw: give {one}--prompts or --text-features")
    if not named:
        return None

    from amskv_jax.text import Texts, read_features, read_prompts  # noqa: PLC0415

    if text_features is not None:
        return pipe.conditions(read_features(text_features))
    texts = tuple(read_prompts(prompts)) if prompts is not None else tuple(prompt or ())
    return pipe.conditions(Texts(texts, tuple(negative_prompt or ())))


def read_codes(path: Path, count: int, drawn: int | None = None) -> "np.ndarray":
    """Return the ``codes`` in a file of forced codes.

    Args:
      path: .npz file.
      count: things to draw, each with codes of its own.
      drawn: pictures that are drawn of these, over and over; ``count`` if not given.

    Raises:
      AmskvError: if it cannot be read, or holds those of another number of pictures.
    """
    import numpy as np  # noqa: PLC0415

    try:
        with np.load(path, allow_pickle=False) as arrays:
            codes: np.ndarray = arrays["codes"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise AmskvError(
            f"{path} holds no forced codes: expected a .npz file with an array codes ({error})"
        ) from error
    if codes.ndim < 2 or len(codes) not in (1, count, drawn):
        raise AmskvError(
            f"{path} holds codes of shape {codes.shape}: expected those of one picture, or of all "
            f"{count}" + (f", or {drawn}" if drawn not in (None, count) else "")
        )
    return codes


def _numbers(text: str, option: str) -> "PerScale":
    """Read one number, or several separated by commas."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text!r}: expected a number, or one for every scale") from None
    for number in numbers:
        if not math.isfinite(number):
            raise UsageError(f"{option} {text!r}: expected a finite number, not {number}")
    return numbers[0] if len(numbers) == 1 else numbers


def _places(text: str) -> tuple[int, ...]:
    """Read places of guidance."""
    places = []
    for part in (part.strip() for part in text.split(",")):
        if part == "logits":
            places.append(0)
            continue
        try:
            place = int(part)
        except ValueError:
            place = 0
        if place >= 0:
            raise UsageError(f"--guide {text!r}: expected logits, or -n as in -4")
        places.append(place)
    return tuple(places)
