"""Classes to draw."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from amskv_jax.errors import UsageError


@dataclass(frozen=True)
class Labels:
    """Numbered classes; beyond the last they begin again. See ``protocol.Conditions``.

    Attributes:
      labels: class indices.
    """

    labels: tuple[int, ...]

    @classmethod
    def of(cls, wanted: Any, num_classes: int) -> "Labels":
        """Return what a user asks for.

        Args:
          wanted: class indices, [N] integers; None for all classes in turn.
          num_classes: classes of the model.

        Raises:
          UsageError: if there are none, or one is not a class of the model.
        """
        if wanted is None:
            return cls(tuple(range(num_classes)))
        array = np.asarray(wanted)
        if array.size == 0:
            raise UsageError(f"no labels given: expected at least one of 0-{num_classes - 1}")
        # Integers beyond 64 bits are objects to NumPy.
        large = array.dtype.kind == "O" and all(isinstance(label, int) for label in array.flat)
        integers = array.dtype.kind in "iu" or large
        if array.ndim != 1 or not integers:
            raise UsageError(
                f"labels have shape {array.shape} and type {array.dtype}: expected a list of "
                "integers"
            )
        wrong = array[(array < 0) | (array >= num_classes)]
        if wrong.size:
            listed = ", ".join(map(str, wrong[:5])) + (", ..." if wrong.size > 5 else "")
            raise UsageError(f"unknown label {listed}: the model has classes 0-{num_classes - 1}")
        return cls(tuple(int(label) for label in array))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, numbers: np.ndarray) -> np.ndarray:
        """Return the classes of pictures with these numbers, [B] int32."""
        return np.array(self.labels, np.int32)[numbers % len(self.labels)]

    def classes(self, numbers: np.ndarray) -> np.ndarray:
        """Return the classes of pictures with these numbers, [B] int32."""
        return self.batch(numbers)

    def captions(self, classes: Sequence[str]) -> Sequence[str]:
        """Return the names of the labels, or their numbers where no names are known."""
        return [classes[label] if classes else f"class {label}" for label in self.labels]
