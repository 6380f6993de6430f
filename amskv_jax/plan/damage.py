"""What it costs to lose or to round every block of a cache: what the policy ``optimal`` plans from.

A *block* is all tokens of one scale in one head of one layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from amskv_jax.errors import AmskvError


@dataclass(frozen=True, eq=False)
class DamageRound:
    """The damage of every choice, measured around one cache: the base.

    Attributes:
      damage: [layers, heads, S - 1, formats, S + 1] float32: by how many nats a token the
        divergence from the full cache grows if the block is kept in a format until a step (that
        step no longer reads it), all others being as in the base; NaN for steps up to the block's
        own. Kept until the step after its own, it is read by none, whatever the format.
      row_bytes: of the base's cache, per batch row.
      divergence: of the base from the full cache, nats a token.
    """

    damage: np.ndarray
    row_bytes: int
    divergence: float


@dataclass(frozen=True, eq=False)
class BlockDamage:
    """What calibration on real pictures measured; see ``calibrate.damage``.

    Attributes:
      formats: names of the formats in which a block may be kept.
      rounds: the first around the full cache, others around plans that were made of it.
      pictures: how many pictures were measured.
    """

    formats: tuple[str, ...]
    rounds: tuple[DamageRound, ...]
    pictures: int

    def nearest(self, row_bytes: int) -> DamageRound:
        """Return the round whose base is nearest in size to a cache of ``row_bytes``."""
        return min(self.rounds, key=lambda one: abs(np.log(one.row_bytes / max(row_bytes, 1))))

    def arrays(self) -> dict[str, Any]:
        """Return what ``of_arrays`` reads, for a file of arrays."""
        return {
            "damage": np.stack([one.damage for one in self.rounds]),
            "damage_row_bytes": np.array([one.row_bytes for one in self.rounds]),
            "damage_divergence": np.array([one.divergence for one in self.rounds]),
            "damage_formats": np.array(self.formats),
            "damage_pictures": self.pictures,
        }

    @classmethod
    def of_arrays(cls, stored: Mapping[str, Any]) -> "BlockDamage | None":
        """Read what ``arrays`` returned; None if there is nothing of it.

        Raises:
          KeyError: if something is missing.
          ValueError: likewise.
        """
        if "damage" not in stored:
            return None
        rounds = zip(
            stored["damage"], stored["damage_row_bytes"], stored["damage_divergence"], strict=True
        )
        return cls(
            tuple(map(str, stored["damage_formats"])),
            tuple(DamageRound(one, int(size), float(kl)) for one, size, kl in rounds),
            int(stored["damage_pictures"]),
        )

    def check(self, layers: int, heads: int, scales: int) -> None:
        """Raise AmskvError unless it was measured of a model of this shape."""
        expected = layers, heads, scales - 1, len(self.formats), scales + 1
        for one in self.rounds:
            if one.damage.shape != expected:
                raise AmskvError(
                    f"the damage of blocks has the shape {one.damage.shape}, not {expected}: "
                    "calibrate this model"
                )
