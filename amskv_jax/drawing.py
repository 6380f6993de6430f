"""Drawing numbered pictures in batches: one compiled program for all of them."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from amskv_jax.decode import decode_pixels
from amskv_jax.device_memory import check_memory, device_limit
from amskv_jax.float8 import check_float8
from amskv_jax.generate import Sampler, Samples, picture_keys
from amskv_jax.mesh import DATA
from amskv_jax.models.guidance import Controls
from amskv_jax.models.protocol import Conditions

IN_FLIGHT = 2
"""Batches the device works on while the host waits for the oldest."""
PICTURES_IN_TURN = 64
"""Pictures, or a batch of more, that are drawn before they are decoded where parts take turns."""

Update = Callable[[str, float], object]
"""Takes what is being done and the share that is done."""


def full_batches(count: int, batch: int) -> list[np.ndarray]:
    """Return numbers of pictures, all batches of one size: the last begins again at the first."""
    return [np.arange(start, start + batch) % count for start in range(0, count, batch)]


@dataclass(frozen=True)
class Chosen:
    """Some of other conditions, in any order; see ``protocol.Conditions``.

    Attributes:
      conditions: the others.
      numbers: which of them.
    """

    conditions: Conditions
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, numbers: np.ndarray) -> Any:
        """See ``protocol.Conditions``."""
        return self.conditions.batch(self._chosen(numbers))

    def classes(self, numbers: np.ndarray) -> np.ndarray | None:
        """See ``protocol.Conditions``."""
        return self.conditions.classes(self._chosen(numbers))

    def captions(self, classes: Sequence[str]) -> list[str]:
        """See ``protocol.Conditions``."""
        captions = self.conditions.captions(classes)
        return [captions[number % len(captions)] for number in self.numbers]

    def _chosen(self, numbers: np.ndarray) -> np.ndarray:
        return np.array(self.numbers)[numbers % len(self.numbers)]


@dataclass(frozen=True)
class Batch:
    """Pictures that were drawn together.

    Attributes:
      first: number of the first.
      count: how many are wanted; more may have been drawn to fill the batch.
      samples: as the sampler returned them.
      pixels: [B, height, width, 3] uint8; None if they were not decoded.
    """

    first: int
    count: int
    samples: Samples
    pixels: jax.Array | None

    def tokens(self) -> np.ndarray:
        """Return the tokens of the wanted pictures, [count, total, *K]."""
        return np.asarray(self.samples.tokens)[: self.count]

    def pictures(self) -> np.ndarray:
        """Return the wanted pictures, uint8 [count, height, width, 3]."""
        assert self.pixels is not None, "the drawer decodes"
        return np.asarray(self.pixels)[: self.count]


class Drawer:
    """A sampler and a decoder compiled for one batch size.

    Picture n of a seed is the same in every batch: its condition and its key follow from n.

    Attributes:
      sampler: what draws.
      batch: pictures drawn at once.
      in_turns: transformer and decoder are on the device one after the other.
      trace_seconds: time that tracing and lowering took.
      compile_seconds: time that all of it took.
      programs: the compiled sampler and, if pictures are decoded, the compiled decoder.
    """

    def __init__(
        self,
        sampler: Sampler,
        params: Any,
        conditions: Conditions,
        controls: Controls,
        batch: int,
        *,
        decode: bool = True,
        in_turns: bool = False,
        device_memory: int | None = None,
    ) -> None:
        """Compile; may be called in any thread, as compilation leaves the interpreter free.

        Args:
          sampler: what to draw with.
          params: the weights, see ``Sampler``; arrays, or structs of their shapes.
          conditions: what to draw, also later: only their shapes are compiled in.
          controls: of the shapes that later ones have.
          batch: pictures drawn at once; on a mesh the next number that shares out over ``data``.
          decode: make pictures of the latents.
          in_turns: put weights, which are the host's, on the device when they are used, and drop
            them afterwards.
          device_memory: bytes that may be used of every device; what the device itself says if not
            given, and anything where it says nothing.

        Raises:
          OutOfMemoryError: if a batch needs more, naming the largest that does not.
          AmskvError: if products are in float8, and the device has none.
        """
        check_float8(sampler.dtype)
        mesh = sampler.mesh
        batch = batch if mesh is None else mesh.filled(batch)
        self.sampler, self.conditions, self.batch = sampler, conditions, batch
        self.in_turns = in_turns
        start = time.perf_counter()
        keys = jax.eval_shape(lambda: picture_keys(jax.random.key(0), batch))
        condition = conditions.batch(np.arange(batch))
        own = _of_pictures(controls, np.arange(batch))
        limit = device_limit() if device_memory is None else device_memory
        check_memory(sampler, batch, condition, limit, decode=decode, in_turns=in_turns)
        lowered = [sampler.lower(params, condition, keys, own)]
        if decode:
            latent = lowered[0].out_info.latent
            if mesh is not None:
                sharding = mesh.sharding(DATA)
                latent = jax.ShapeDtypeStruct(latent.shape, latent.dtype, sharding=sharding)
            how = sampler.model, sampler.plan.schedule, sampler.activation_dtype
            lowered.append(decode_pixels.lower(*how, _tokenizer(params), latent, mesh))
        self.trace_seconds = time.perf_counter() - start
        self.programs = [program.compile() for program in lowered]
        self.compile_seconds = time.perf_counter() - start

    def call(
        self, params: Any, condition: Any, keys: jax.Array, controls: Controls
    ) -> tuple[Samples, jax.Array | None]:
        """Start one batch on the device; arguments are those of ``Sampler``.

        Returns:
          What the sampler returns, and the pixels [B, height, width, 3] uint8 if they are decoded.
        """
        samples: Samples = self.programs[0](params, condition, keys, controls)
        decoded = [decoder(_tokenizer(params), samples.latent) for decoder in self.programs[1:]]
        return samples, decoded[0] if decoded else None

    def batches(
        self, params: Any, seed: int, first: int, count: int, controls: Controls
    ) -> Iterator[Batch]:
        """Yield pictures ``first : first + count`` of a seed in batches.

        The device is kept busy: some batches are under way while one is looked at.

        Args:
          params: the weights.
          seed: of the random numbers.
          first: number of the first picture.
          count: pictures.
          controls: see ``Sampler``; forced codes are those of pictures 0 to N - 1, and begin
            again after them.
        """
        starts = range(first, first + count, self.batch)
        if self.in_turns:
            size = max(1, PICTURES_IN_TURN // self.batch)
            for begin in range(0, len(starts), size):
                own_starts = starts[begin : begin + size]
                yield from self._turn(params, seed, own_starts, first + count, controls)
            return
        running: deque[Batch] = deque()
        for start in starts:
            called = self.call(params, *self._inputs(seed, start, controls))
            running.append(Batch(start, min(self.batch, first + count - start), *called))
            if len(running) > IN_FLIGHT:
                yield running.popleft()
        yield from running

    def _inputs(self, seed: int, start: int, controls: Controls) -> tuple[Any, jax.Array, Controls]:
        """Return condition, keys and controls of a batch."""
        numbers = np.arange(start, start + self.batch)
        condition, own = self.conditions.batch(numbers), _of_pictures(controls, numbers)
        return condition, _keys(seed, start, self.batch), own

    def _turn(
        self, params: Any, seed: int, starts: range, end: int, controls: Controls
    ) -> Iterator[Batch]:
        """Yield the batches that begin at ``starts``: all are drawn, and then decoded."""
        held = {**params, "transformer": jax.device_put(params["transformer"])}
        drawn = [
            jax.device_get(self.programs[0](held, *self._inputs(seed, start, controls)))
            for start in starts
        ]
        del held
        for start, samples in zip(starts, drawn, strict=True):
            pixels = [decoder(_tokenizer(params), samples.latent) for decoder in self.programs[1:]]
            jax.block_until_ready(pixels)  # or the next batch's would lie beside
            yield Batch(start, min(self.batch, end - start), samples, pixels[0] if pixels else None)

    def draw(
        self, params: Any, seed: int, first: int, count: int, controls: Controls
    ) -> np.ndarray:
        """Return pictures ``first : first + count`` of a seed, uint8; see ``batches``."""
        batches = self.batches(params, seed, first, count, controls)
        return np.concatenate([batch.pictures() for batch in batches])


def _of_pictures(controls: Controls, numbers: np.ndarray) -> Controls:
    """Return controls with the forced codes of the pictures with these numbers."""
    if controls.forced is None:
        return controls
    chosen = controls.forced[numbers % len(controls.forced)]
    return controls.replace(forced=chosen)  # type: ignore[attr-defined]


def _tokenizer(params: Any) -> Any:
    """Return the weights that decoding needs, so that it is compiled for no others."""
    return {"tokenizer": params["tokenizer"]}


def _keys(seed: int, first: int, count: int) -> jax.Array:
    return _fold(jax.random.key(seed), np.arange(first, first + count, dtype=np.int32))


@jax.jit
def _fold(key: jax.Array, numbers: jax.Array) -> jax.Array:
    keys: jax.Array = jax.vmap(partial(jax.random.fold_in, key))(numbers)
    return keys
