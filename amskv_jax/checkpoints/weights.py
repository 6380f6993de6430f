"""Weights by path: in which type they are stored, which there must be, and how they are told apart.

A tree of weights is flat here, {path: array}, the names along the way joined by slashes.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from amskv_jax.eight_bits import rounding_of
from amskv_jax.errors import AmskvError
from amskv_jax.models.kinds import optional_parts, param_shapes
from amskv_jax.models.protocol import Model
from amskv_jax.packed_weight import PackedWeight
from amskv_jax.precision import activation_dtype

Shape = tuple[int, ...]

DTYPES = ("float32", "bfloat16")
ALWAYS_FLOAT32 = {"quantizer", "log_temperature"}
"""Parameters which stay float32 in bfloat16 checkpoints: small, and rounding them moves tokens."""

EXACT = {"quantizer", "log_temperature"}
"""Names in the paths of parameters that are never compressed, whatever their size."""
SMALL = 2**15
"""Nor are parameters with fewer values than this."""

FINGERPRINT_SAMPLES = 4096
MAX_REPORTED = 20


def storage_dtype(path: str, dtype: str) -> np.dtype:
    """Return the type in which a checkpoint of ``dtype`` stores the parameter at ``path``.

    It is ``dtype`` itself, except for the few parameters where rounding would change tokens at
    once: the quantiser (codebook and phi) and the attention temperatures.

    Raises:
      AmskvError: if ``dtype`` is neither "float32" nor "bfloat16".
    """
    if dtype not in DTYPES:
        raise AmskvError(f"weights cannot be stored as {dtype}: choose {' or '.join(DTYPES)}")
    return np.dtype(jnp.float32 if ALWAYS_FLOAT32 & set(path.split("/")) else dtype)


class Fingerprint:
    """Short texts by which to tell whether something was computed with some weights.

    One is the SHA-256 of all paths, shapes and some thousand values of every parameter, rounded to
    bfloat16: the float32 and the bfloat16 checkpoint of one model have the same. Parameters are
    added one by one, in any order; of each only the samples are kept.
    """

    def __init__(self) -> None:
        self._samples: dict[str, bytes] = {}

    def add(self, path: str, leaf: Any) -> None:
        """Take in the parameter at ``path``."""
        values = np.asarray(leaf).reshape(-1)
        # An odd step, so that sizes that are powers of two do not confine the samples to a column.
        samples = values[:: values.size // FINGERPRINT_SAMPLES | 1].astype(jnp.bfloat16)
        self._samples[path] = f"{np.shape(leaf)}\n".encode() + samples.tobytes()

    def of_all(self) -> str:
        """Return the fingerprint of all that was added."""
        return _digest(self._samples)

    def of_part(self, part: str) -> str:
        """Return the fingerprint of what lies below the path ``part``."""
        start = f"{part}/"
        return _digest(
            {
                path.removeprefix(start): samples
                for path, samples in self._samples.items()
                if path.startswith(start)
            }
        )

    def of_model(self, model: Model) -> str:
        """Return the fingerprint of the parts which a model of this kind must have.

        What was measured of a model's attention belongs to these: a text encoder may be another
        one, or be missing.
        """
        starts = tuple(f"{part}/" for part in required_parts(model))
        return _digest({p: s for p, s in self._samples.items() if p.startswith(starts)})


def _digest(samples: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for path, content in sorted(samples.items()):
        digest.update(f"{path} ".encode() + content)
    return digest.hexdigest()[:32]


def fingerprint(params: Mapping[str, Any]) -> str:
    """Return the fingerprint of a tree of weights, see ``Fingerprint``."""
    found = Fingerprint()
    for path, leaf in flatten_dict(params, sep="/").items():
        found.add(path, leaf)
    return found.of_all()


def required_parts(model: Model) -> list[str]:
    """Return the parts without which there is no model of this kind."""
    optional = optional_parts(model)
    return [part for part in model.parts if part not in optional]


def model_shapes(model: Model, parts: Iterable[str] | None = None) -> dict[str, Shape]:
    """Return the shapes of all parameters of a model, or of some parts, by "part/path"."""
    return {
        f"{part}/{path}": shape
        for part in (model.parts if parts is None else parts)
        for path, shape in param_shapes(model.parts[part]).items()
    }


def put_weight(
    path: str, leaf: np.ndarray, dtype: str, put: Callable[[str, np.ndarray], Any]
) -> Any:
    """Return a parameter as it is used where products are in ``dtype``.

    Args:
      path: "part/path" of the parameter.
      leaf: its values.
      dtype: "float32", "bfloat16" or "float8": then kernels are rounded here.
      put: puts a parameter on the devices, given its path and values.

    Raises:
      AmskvError: if the dtype is unknown.
    """
    target = storage_dtype(path, activation_dtype(dtype))
    placed = put(path, leaf.astype(target, copy=False))
    rounding = rounding_of(path, leaf.shape, dtype)
    return placed if rounding is None else rounding(placed)


def packed_stacks(path: str, shape: Shape) -> bool:
    """Return whether a parameter stays in 8 bits where memory is little.

    These are the large kernels which are stacked over layers, nearly all of a transformer: they are
    widened a layer at a time.
    """
    return len(shape) == 3 and math.prod(shape) >= SMALL and not EXACT & set(path.split("/"))


def part_structs(model: Model, part: str, dtype: str, *, low_memory: bool = False) -> Any:
    """Return the shapes of a part's weights as they lie on a device, a tree of structs.

    Args:
      model: kind and shape of the model.
      part: its name.
      dtype: in which they are loaded, see ``put_weight``.
      low_memory: as ``folder.load_on_host`` loads them.
    """
    struct: Any = jax.ShapeDtypeStruct
    flat: dict[str, Any] = {}
    for path, shape in param_shapes(model.parts[part]).items():
        numbers = storage_dtype(f"{part}/{path}", activation_dtype(dtype))
        if low_memory and packed_stacks(path, shape):
            scale = struct((*shape[:-2], 1, shape[-1]), jnp.float32)
            flat[path] = PackedWeight(struct(shape, jnp.int8), scale, numbers.name)
        elif rounding := rounding_of(f"{part}/{path}", shape, dtype):
            flat[path] = jax.eval_shape(rounding, struct(shape, numbers))
        else:
            flat[path] = struct(shape, numbers)
    return unflatten_dict(flat, sep="/")


def check_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], source: str) -> None:
    """Raise an AmskvError, which says how they differ, unless ``found`` are the expected shapes.

    Args:
      expected: shapes by path, of ``model_shapes``.
      found: the same of the parameters at hand.
      source: of the parameters, for the message.
    """
    problems = describe_differences(expected, found)
    if problems:
        raise AmskvError(f"{source} does not fit its configuration:\n  " + "\n  ".join(problems))


def describe_differences(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[str]:
    """Return lines about all names that are missing, unexpected or of another shape.

    Of each kind the first 20 are listed.
    """
    missing = [f"missing: {name} {expected[name]}" for name in expected if name not in found]
    unexpected = [f"unexpected: {name} {found[name]}" for name in found if name not in expected]
    misshaped = [
        f"wrong shape: {name}, expected {shape}, found {found[name]}"
        + (" (transposed)" if found[name] == shape[::-1] else "")
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    lines = []
    for group in (missing, unexpected, misshaped):
        lines += group[:MAX_REPORTED]
        if len(group) > MAX_REPORTED:
            lines.append(f"... and {len(group) - MAX_REPORTED} more {group[0].partition(':')[0]}")
    return lines
