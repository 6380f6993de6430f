"""Tables that say where the entries of a PyTorch state dict stand in this package's parameters."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from amskv_jax.convert.tensors import Tensor
from amskv_jax.errors import AmskvError

Shape = tuple[int, ...]
Entry = np.ndarray | Tensor
StateDict = Mapping[str, Entry]
"""The reference's names and arrays, in PyTorch's layout, at hand or in a file."""


@dataclass(frozen=True)
class Transform:
    """How the layout of one array differs; both directions return views and copy nothing.

    Attributes:
      name: what it does, for people.
      forward: from the reference's layout to this package's.
      inverse: back.
    """

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def transpose(name: str, *axes: int) -> Transform:
    """Return the transform which permutes the axes."""
    inverse = tuple(np.argsort(axes).tolist())
    return Transform(name, lambda x: x.transpose(axes), lambda x: x.transpose(inverse))


def squeeze(*axes: int) -> Transform:
    """Return the transform which drops axes of length 1."""
    name = f"without axes {axes}"
    return Transform(name, lambda x: x.squeeze(axes), lambda x: np.expand_dims(x, axes))


IDENTITY = Transform("identity", lambda x: x, lambda x: x)
LINEAR = transpose("out, in -> in, out", 1, 0)
CONVOLUTION = transpose("OIHW -> HWIO", 2, 3, 1, 0)


@dataclass(frozen=True)
class Place:
    """Where one entry of a state dict goes.

    Attributes:
      path: the parameter, its names joined by slashes.
      index: position on the parameter's leading axis, or None if the entry is all of it. Where
        entries are numbered in groups, their numbers, which order them.
      transform: the change of layout.
    """

    path: str
    index: int | tuple[int, ...] | None
    transform: Transform


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
      key: the reference's name, with placeholders such as ``{layer}`` for words or numbers.
      place: path of the parameter with the same placeholders; a suffix such as ``[{layer}]`` says
        that the entry is one of several which are stacked on a leading axis; ``[{group}.{layer}]``
        that they are numbered anew in every group.
      transform: the change of layout.
    """

    key: str
    place: str
    transform: Transform = IDENTITY

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[a-z]+|\\d+)", re.escape(self.key)))

    def find(self, key: str) -> Place | None:
        """Return the place of ``key``, or None if this rule says nothing about it."""
        match = self._pattern.fullmatch(key)
        if match is None:
            return None
        path, _, index = self.place.format(**match.groupdict()).partition("[")
        numbers = tuple(map(int, index[:-1].split("."))) if index else (None,)
        return Place(path, numbers if len(numbers) > 1 else numbers[0], self.transform)


def module(key: str, place: str, transform: Transform, index: str = "") -> tuple[Rule, Rule]:
    """Return the rules of a layer's weight (our kernel) and bias."""
    return (
        Rule(f"{key}.weight", f"{place}/kernel{index}", transform),
        Rule(f"{key}.bias", f"{place}/bias{index}"),
    )


def norm(key: str, place: str, index: str = "") -> tuple[Rule, Rule]:
    """Return the rules of a normalisation's weight (our scale) and bias."""
    return (
        Rule(f"{key}.weight", f"{place}/scale{index}"),
        Rule(f"{key}.bias", f"{place}/bias{index}"),
    )


@dataclass(frozen=True)
class Table:
    """A model's rules, used to read its checkpoints as well as to write them.

    Attributes:
      rules: exactly one of them fits any key of the model.
    """

    rules: tuple[Rule, ...]

    def find(self, key: str) -> Place | None:
        """Return the place of a key, or None if it is not the model's."""
        places = (rule.find(key) for rule in self.rules)
        return next((place for place in places if place is not None), None)

    def leaves(
        self,
        state: StateDict,
        dtype: Callable[[str], np.dtype],
        seen: Callable[[str, np.ndarray], None] = lambda key, values: None,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the parameters of a state dict one by one: (path, array).

        Every parameter is allocated once and filled in place, entry by entry, so beside it nothing
        but one entry is held.

        Args:
          state: exactly the model's entries, see ``Architecture.check``; read when they are used.
          dtype: the type in which to store the parameter at a path.
          seen: told the key of every entry that has been read, and what was made of it.
        """
        for path, members in self.places(state).items():
            key, place = next(iter(members.items()))
            stack = () if place.index is None else (len(members),)
            leaf = np.empty((*stack, *_shape_after(place, state[key].shape)), dtype(path))
            for key, place in members.items():
                own = leaf[...] if place.index is None else leaf[place.index]
                own[...] = place.transform.forward(np.asarray(state[key]))
                seen(key, own)
            yield path, leaf
            del leaf, own  # whoever took it decides how long it is held

    def to_params(self, state: StateDict, dtype: Callable[[str], np.dtype]) -> dict[str, Any]:
        """Return the parameter tree of a state dict, nested dicts of NumPy arrays; see ``leaves``.

        Beside the input and the output nothing but one entry is held.
        """
        return unflatten_dict(dict(self.leaves(state, dtype)), sep="/")

    def to_state_dict(self, params: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
        """Return views of the parameters under the reference's keys and in its layout."""
        places = self.places(keys)
        return {
            key: value
            for path, leaf in flatten_dict(params, sep="/").items()
            for key, value in entries_of(np.asarray(leaf), places[path])
        }

    def places(self, keys: Iterable[str]) -> dict[str, dict[str, Place]]:
        """Return which entries make each parameter: path -> key -> place.

        Entries that are numbered in groups get their positions here, as all of them are known.
        """
        result: dict[str, dict[str, Place]] = defaultdict(dict)
        for key in keys:
            place = self._place(key)
            result[place.path][key] = place
        for members in result.values():
            numbers = [(p.index, key) for key, p in members.items() if isinstance(p.index, tuple)]
            for position, (_, key) in enumerate(sorted(numbers)):
                members[key] = replace(members[key], index=position)
        return result

    def param_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the parameters' {path: shape} from the shapes of the entries."""
        result = {}
        for path, members in self.places(shapes).items():
            key, place = next(iter(members.items()))
            one = _shape_after(place, shapes[key])
            result[path] = one if place.index is None else (len(members), *one)
        return result

    def _place(self, key: str) -> Place:
        place = self.find(key)
        if place is None:
            raise AmskvError(f"no rule for the entry {key}")
        return place


def entries_of(leaf: np.ndarray, places: Mapping[str, Place]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the entries that make a parameter, as views of it in the reference's layout."""
    for key, place in places.items():
        yield key, place.transform.inverse(leaf if place.index is None else leaf[place.index])


def _shape_after(place: Place, shape: Shape) -> Shape:
    """Return the shape which an entry of this shape has in this package's layout."""
    # A view of one zero has the shape but not the size.
    return place.transform.forward(np.broadcast_to(np.float32(0), shape)).shape
