"""What the conversion of every architecture has in common: recognise, check, convert, export."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from amskv_jax.checkpoints.weights import describe_differences, storage_dtype
from amskv_jax.convert.read import Source
from amskv_jax.convert.table import Entry, Shape, StateDict, Table
from amskv_jax.errors import AmskvError

BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV", "mask")
"""Last part of the names of entries which are constants or training statistics, not weights."""

Config = TypeVar("Config")


@dataclass(frozen=True)
class Found:
    """What is known of a part, when the configurations of those behind it are inferred.

    Attributes:
      config: its configuration.
      settings: what its file or folder and the user said about it.
    """

    config: Any
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Architecture(Generic[Config]):
    """How state dicts of one architecture are converted.

    Attributes:
      name: what it is, with its article.
      keys: names by which its state dict is found in a file. No other architecture has the first.
      table: where its entries go.
      shapes: the entries, buffers left out, with their shapes in PyTorch's layout.
      buffers: the buffers which the reference expects beside them.
      describe: a configuration in words.
      rename: the usual name of an entry for which the reference has several.
      reshape: the usual shape of the entry with this usual name, where the reference has several.
      aliases: entries which are the same tensor as another, {name: that of the other}. One of the
        two suffices; both are written.
      foreign: beginnings of the names of other models' entries that may lie in the same file.
      infer: the configuration, from what was read and from the parts before it, by name.
      files: small files in the same folder which the part needs besides its weights.
    """

    name: str
    keys: tuple[str, ...]
    table: Table
    shapes: Callable[[Config], dict[str, Shape]]
    buffers: Callable[[Config], dict[str, np.ndarray]]
    describe: Callable[[Config], str]
    rename: Callable[[str], str] = lambda key: key
    reshape: Callable[[str, Shape], Shape] = lambda key, shape: shape
    aliases: Mapping[str, str] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    infer: "Callable[[Source, Mapping[str, Found]], Config] | None" = None
    files: tuple[str, ...] = ()

    def weights(self, state: StateDict) -> dict[str, Entry]:
        """Return the entries under their usual names, each once, without the buffers."""
        weights = {
            self.rename(key): value
            for key, value in state.items()
            if not is_buffer(key) and not key.startswith(self.foreign)
        }
        for alias, name in self.aliases.items():
            if alias in weights:
                weights.setdefault(name, weights.pop(alias))
        return weights

    def check_kind(self, keys: Collection[str], source: str) -> None:
        """Raise an AmskvError if the keys in ``source`` are not those of this architecture."""
        if not any(key in keys for key in self.keys):
            some = ", ".join(sorted(keys)[:5])
            raise AmskvError(f"{source} does not hold {self.name}; its entries are {some}, ...")

    def check(self, weights: StateDict, config: Config, source: str) -> None:
        """Raise one AmskvError about all entries that are missing, unexpected or do not fit."""
        found = {key: self.reshape(key, value.shape) for key, value in weights.items()}
        problems = describe_differences(self.shapes(config), found)
        problems += [
            f"not floating point: {key} is {value.dtype}"
            for key, value in weights.items()
            if not jnp.issubdtype(value.dtype, jnp.floating)
        ]
        if problems:
            raise AmskvError(
                f"{source} does not fit {self.describe(config)}:\n  " + "\n  ".join(problems)
            )

    def leaves(
        self,
        state: StateDict,
        config: Config,
        dtype: str = "float32",
        source: str = "the state dict",
        *,
        keep_not_finite: bool = False,
        progress: Callable[[int], None] = lambda num_bytes: None,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the parameters of a state dict, read one after the other: (path, array).

        Args:
          state: the reference's entries; buffers are ignored.
          config: the model's shape.
          dtype: "float32" or "bfloat16", see ``weights.storage_dtype``.
          source: what to call the state dict in messages.
          keep_not_finite: take weights that hold NaN or infinity.
          progress: told the size of every entry that has been read, in bytes.

        Raises:
          AmskvError: if the state dict does not fit ``config``, or a weight is not finite.
        """
        weights = self.weights(state)
        self.check(weights, config, source)

        def seen(key: str, values: np.ndarray) -> None:
            wrong = 0 if keep_not_finite else count_not_finite(values)
            if wrong:
                raise AmskvError(
                    f"{source} holds weights that are not finite: {wrong} of the "
                    f"{values.size} numbers in {key} are NaN or infinite. Download or train it "
                    "again, or keep them with --keep-not-finite"
                )
            progress(weights[key].nbytes)

        yield from self.table.leaves(weights, lambda path: storage_dtype(path, dtype), seen)

    def to_params(
        self,
        state: StateDict,
        config: Config,
        dtype: str = "float32",
        source: str = "the state dict",
    ) -> dict[str, Any]:
        """Return the parameters of a state dict as nested dicts of NumPy arrays, see ``leaves``."""
        return unflatten_dict(dict(self.leaves(state, config, dtype, source)), sep="/")

    def to_state_dict(self, params: Mapping[str, Any], config: Config) -> dict[str, np.ndarray]:
        """Return the reference's state dict: views of ``params``, and the buffers made anew.

        Raises:
          AmskvError: if the parameters do not fit ``config``.
        """
        shapes = self.shapes(config)
        found = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
        problems = describe_differences(self.table.param_shapes(shapes), found)
        if problems:
            raise AmskvError(
                f"the parameters do not fit {self.describe(config)}:\n  " + "\n  ".join(problems)
            )
        state = self.table.to_state_dict(params, shapes) | self.buffers(config)
        return state | {alias: state[name] for alias, name in self.aliases.items()}


def count_not_finite(values: np.ndarray) -> int:
    """Return how many numbers of a float32 or bfloat16 array are NaN or infinite."""
    if values.dtype == np.float32:
        return values.size - int(np.count_nonzero(np.isfinite(values)))
    exponent = values.view(np.uint16) & 0x7F80  # much faster than asking bfloat16 numbers
    return int(np.count_nonzero(exponent == 0x7F80))


def is_buffer(key: str) -> bool:
    """Tell whether a key of a state dict names a buffer."""
    return key.rpartition(".")[2] in BUFFERS


def count(state: StateDict, pattern: str) -> int:
    """Return one more than the largest number that is the group of ``pattern`` in any key."""
    matches = (re.match(pattern, key) for key in state)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def rows(state: StateDict, key: str, columns: int, default: int) -> int:
    """Return the size of an entry over ``columns``, whatever its layout; ``default`` without it.

    A missing entry is reported later, together with all others, against the default shape.
    """
    return math.prod(state[key].shape) // columns if key in state else default
