"""What it costs to lose or to round every block of a cache: what the policy ``optimal`` plans from.

A *block* is all tokens of one scale in one head of one layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from amskv_jax.errors import AmskvError, UsageError


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
      formats: from which the base was made; none if it is the full cache.
      made_of: the round whose damage the base was planned by: of all before it, the one whose plan
        of this size diverged least.
    """

    damage: np.ndarray
    row_bytes: int
    divergence: float
    formats: tuple[str, ...] = ()
    made_of: int = 0


@dataclass(frozen=True, eq=False)
class BlockDamage:
    """What calibration on real pictures measured; see ``calibrate.damage``.

    Attributes:
      formats: names of the formats in which a block may be kept.
      rounds: the first around the full cache, others around plans that were made of those before.
      pictures: how many pictures were measured.
    """

    formats: tuple[str, ...]
    rounds: tuple[DamageRound, ...]
    pictures: int

    def best(self, row_bytes: int) -> DamageRound:
        """Return the round that is best to plan a cache of ``row_bytes`` by.

        It is the one that the base nearest in size was made of: of bases of just these formats and
        the full cache, if there are any, else of all; of equal ones the least divergent.
        """
        full, *others = self.rounds
        made = [one for one in others if one.formats == self.formats]

        def apart(one: DamageRound) -> tuple[float, float]:
            return abs(float(np.log(one.row_bytes / max(row_bytes, 1)))), one.divergence

        return self.rounds[min((full, *(made or others)), key=apart).made_of]

    def of_formats(self, names: Sequence[str]) -> "BlockDamage":
        """Return what was measured of some formats.

        Raises:
          UsageError: if one was not measured, or is named twice.
        """
        strange = [name for name in names if name not in self.formats]
        if strange or not names or len(set(names)) < len(names):
            raise UsageError(
                f"formats of blocks {'+'.join(names)!r}: expected some of those which were "
                f"measured, {', '.join(self.formats)}, each once"
            )
        own = [index for index, name in enumerate(self.formats) if name in names]
        rounds = (replace(one, damage=one.damage[..., own, :]) for one in self.rounds)
        return replace(self, formats=tuple(self.formats[i] for i in own), rounds=tuple(rounds))

    def arrays(self) -> dict[str, Any]:
        """Return what ``of_arrays`` reads, for a file of arrays."""
        return {
            "damage": np.stack([one.damage for one in self.rounds]),
            "damage_row_bytes": np.array([one.row_bytes for one in self.rounds]),
            "damage_divergence": np.array([one.divergence for one in self.rounds]),
            "damage_bases": np.array(["+".join(one.formats) for one in self.rounds]),
            "damage_made_of": np.array([one.made_of for one in self.rounds]),
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
        columns = ("row_bytes", "divergence", "bases", "made_of")
        given = (stored[f"damage_{name}"] for name in columns)
        rounds = zip(stored["damage"], *given, strict=True)
        return cls(
            tuple(map(str, stored["damage_formats"])),
            tuple(
                DamageRound(
                    one, int(size), float(kl), tuple(filter(None, str(base).split("+"))), int(of)
                )
                for one, size, kl, base, of in rounds
            ),
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
