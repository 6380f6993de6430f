"""Several devices: pictures over the mesh's axis ``data``, heads and feed-forward over ``model``.

A program runs under ``jax.shard_map``: every device runs it on its own pictures and its own heads,
so that nothing is exchanged but what ``summed``, ``gathered`` and ``mean_over`` say. (Left
to the compiler, the three parts of ``qkv`` and the in-place writes of the cache would cost an
exchange in every block.) Modules ask ``shards`` for how many parts of a block there are; outside of
a mesh there is one, and nothing below does anything.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from amskv_jax.errors import AmskvError, UsageError

DATA, MODEL = "data", "model"
TRANSPOSED, CHANNEL_SCALE = "transposed", "channel_scale"
"""Parts of a kernel in 8 bits: its numbers, with the last axes swapped, and scales."""


class Share(NamedTuple):
    """How a parameter is shared out over ``model``.

    Attributes:
      axis: which of its axes, from the end.
      parts: the axis holds so many equal parts, such as queries, keys and values, of each of which
        every device has its share.
    """

    axis: int = -1
    parts: int = 1

    def split(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a parameter whose parts have an axis of their own."""
        axis = len(shape) + self.axis
        return (*shape[:axis], self.parts, shape[axis] // self.parts, *shape[axis + 1 :])

    def join(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that ``split`` was given."""
        axis = len(shape) + self.axis
        return (*shape[: axis - 1], self.parts * shape[axis], *shape[axis + 1 :])


SHARES: dict[str, Share] = {
    "attention/qkv/kernel": Share(parts=3),
    "attention/query_bias": Share(),
    "attention/value_bias": Share(),
    "attention/log_temperature": Share(),
    "attention/query/kernel": Share(),
    "attention/key/kernel": Share(),
    "attention/value/kernel": Share(),
    "attention/out/kernel": Share(axis=-2),
    "cross/query/kernel": Share(),
    "cross/query/bias": Share(),
    "cross/out/kernel": Share(axis=-2),
    "text_keys_values/kernel": Share(parts=2),
    "text_keys_values/value_bias": Share(),
    "mlp/gate/kernel": Share(),
    "mlp/up/kernel": Share(),
    "mlp/up/bias": Share(),
    "mlp/down/kernel": Share(axis=-2),
    "modulation/kernel": Share(),
    "modulation/bias": Share(),
}
"""End of a parameter's path -> how it is shared out. All other parameters, the decoders' among
them, are whole on every device: they are small."""


@dataclass(frozen=True)
class MeshShape:
    """How many devices of this host share the work, and how.

    Attributes:
      data: groups of devices, each of which draws pictures of its own.
      model: devices of a group, each of which has some heads of every layer, with their part of the
        cache, and a part of the feed-forward layers.

    Raises:
      UsageError: if one is below 1.
    """

    data: int = 1
    model: int = 1

    def __post_init__(self) -> None:
        for name in (DATA, MODEL):
            if getattr(self, name) < 1:
                raise UsageError(f"a mesh of {name}={getattr(self, name)}: expected 1 or more")

    @classmethod
    def parse(cls, text: str | None) -> "MeshShape | None":
        """Return the mesh that ``data=4,model=2`` describes, in any order; None for None.

        Raises:
          UsageError: if it describes none.
        """
        if text is None:
            return None
        found = [re.fullmatch(r"\s*(data|model)\s*=\s*(\d+)\s*", part) for part in text.split(",")]
        sizes = {match[1]: int(match[2]) for match in found if match}
        if len(sizes) < len(found):
            raise UsageError(f"mesh {text!r}: expected data=N, model=M or data=N,model=M")
        return cls(**sizes)

    def __str__(self) -> str:
        return f"data={self.data},model={self.model}"

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.model

    @property
    def mesh(self) -> Mesh:
        """The first of this host's devices as a mesh; raises AmskvError if there are too few."""
        return _mesh(self)

    def filled(self, batch: int) -> int:
        """Return the least batch of ``batch`` pictures or more that shares out over ``data``."""
        return -(-batch // self.data) * self.data

    def check(self, num_heads: int, batch: int | None = None) -> None:
        """Raise a UsageError unless heads, and pictures of a batch, share out equally."""
        if num_heads % self.model:
            divisors = [n for n in range(2, num_heads + 1) if num_heads % n == 0]
            raise UsageError(
                f"{num_heads} heads do not share out over model={self.model}: "
                f"take one of {', '.join(map(str, divisors))}"
            )
        if batch is not None and batch % self.data:
            raise UsageError(
                f"{batch} pictures at once do not share out over data={self.data}: "
                f"draw {self.filled(batch)}, and leave out those that are not wanted"
            )

    def sharding(self, *axes: Any) -> NamedSharding:
        """Return the placing of arrays whose axes lie along these axes of the mesh."""
        return NamedSharding(self.mesh, P(*axes))

    def place(self, path: str, leaf: np.ndarray) -> jax.Array:
        """Put a parameter on the devices, on each no more than its share.

        Args:
          path: of the parameter, "part/...".
          leaf: as checkpoints have it.

        Returns:
          The array; where the share is one of several parts these have an axis of their own.
        """
        viewed = self._viewed(path, leaf)
        return jax.device_put(viewed, NamedSharding(self.mesh, self._spec(path, viewed)))

    def struct(self, path: str, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        """Return what ``place`` does to a parameter of this shape, without one."""
        viewed = jax.eval_shape(lambda: self._viewed(path, jax.numpy.zeros(shape, dtype)))
        sharding = NamedSharding(self.mesh, self._spec(path, viewed))
        return jax.ShapeDtypeStruct(viewed.shape, dtype, sharding=sharding)

    def run(
        self,
        function: Callable[..., Any],
        params: Any,
        inputs: tuple[Any, ...],
        specs: tuple[Any, ...],
        out_specs: Any,
    ) -> Any:
        """Return ``function(params, *inputs)``, run by every device on its own share.

        Args:
          function: is traced with the shapes of one device's share.
          params: as ``place`` returns them; what is not placed so is, in every call.
          inputs: of any kind.
          specs: for every one of ``inputs``, along which axes of the mesh its axes lie.
          out_specs: likewise for the result.
        """
        params = _map(self._viewed, params)

        def local(params: Any, *inputs: Any) -> Any:
            return function(_map(self._joined, params), *inputs)

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(_map(self._spec, params), *specs),
            out_specs=out_specs,
            check_vma=False,
        )(params, *inputs)

    def _share(self, path: str) -> Share | None:
        if self.model == 1:
            return None
        kernel, _, leaf = path.rpartition("/")
        of_eight_bits = leaf in (TRANSPOSED, CHANNEL_SCALE)
        ending = f"/{kernel if of_eight_bits else path}"
        share = next((s for end, s in SHARES.items() if ending.endswith(f"/{end}")), None)
        if share is not None and leaf == TRANSPOSED:
            return share._replace(axis=-3 - share.axis)
        if share is not None and leaf == CHANNEL_SCALE and share.axis != -1:
            return None  # the contracted channels are shared out, which it has none of
        return share

    def _viewed(self, path: str, leaf: Any) -> Any:
        """Return a parameter with the parts of its last axis on an axis of their own."""
        share = self._share(path)
        parted = 3 if path.endswith(CHANNEL_SCALE) else 4
        if share is None or share.parts == 1 or leaf.ndim == parted:
            return leaf
        return leaf.reshape(share.split(leaf.shape))

    def _joined(self, path: str, leaf: Any) -> Any:
        """Undo ``_viewed``."""
        share = self._share(path)
        if share is None or share.parts == 1:
            return leaf
        return leaf.reshape(share.join(leaf.shape))

    def _spec(self, path: str, leaf: Any) -> P:
        share = self._share(path)
        if share is None:
            return P()
        size = leaf.shape[share.axis]
        if size % self.model:
            raise UsageError(f"{path} has {size} channels, which model={self.model} cannot share")
        axes: list[str | None] = [None] * leaf.ndim
        axes[share.axis] = MODEL
        return P(*axes)


@lru_cache(maxsize=64)
def _mesh(shape: MeshShape) -> Mesh:
    devices = jax.local_devices()
    if shape.size > len(devices):
        raise AmskvError(
            f"a mesh of {shape} takes {shape.size} devices, this host has {len(devices)} "
            f"({devices[0].device_kind}): take a smaller one"
        )
    kinds = (AxisType.Auto, AxisType.Auto)
    sizes = shape.data, shape.model
    return jax.make_mesh(sizes, (DATA, MODEL), kinds, devices=devices[: shape.size])


def put_on(mesh: MeshShape | None) -> Callable[[str, np.ndarray], jax.Array]:
    """Return what puts the parameter at a path on a mesh, or on JAX's default device."""
    return (lambda path, leaf: jax.device_put(leaf)) if mesh is None else mesh.place


def shards(axis: str = MODEL) -> int:
    """Return over how many devices an axis of the mesh goes where this is traced; 1 outside."""
    mesh = jax.sharding.get_abstract_mesh()
    return int(mesh.shape[axis]) if axis in mesh.manual_axes else 1


def summed(product: jax.Array) -> jax.Array:
    """Return a product, summed over the devices which share the contracted channels."""
    return lax.psum(product, MODEL) if shards() > 1 else product


def gathered(x: jax.Array, axis: int) -> jax.Array:
    """Return all shares of an array, which lie along ``axis``, on every device."""
    return lax.all_gather(x, MODEL, axis=axis % x.ndim, tiled=True) if shards() > 1 else x


def mean_over(x: jax.Array, *axes: str) -> jax.Array:
    """Return the mean of what the devices along some axes of the mesh have."""
    shared = tuple(axis for axis in axes if shards(axis) > 1)
    return lax.pmean(x, shared) if shared else x


def _map(function: Callable[[str, Any], Any], params: Any) -> Any:
    """Return a tree of parameters with ``function(path, leaf)`` in place of every leaf."""

    def call(keys: tuple[Any, ...], leaf: Any) -> Any:
        return function(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(call, params)
