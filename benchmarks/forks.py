"""Forks of Infinity that compress its cache: the models they serve, and how these get their cache.

Each is the user's own checkout, of ScaleKV (arXiv 2505.19602) or of HeatKV (arXiv 2605.14877), with
the settings of its own examples: a tenth of the cache. Both know squares of 1M pixels alone.
"""

import importlib
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = {"infinity-2b": "2b", "infinity-8b": "8b"}
"""Models that both forks serve -> their names in the forks' files."""


@dataclass(frozen=True)
class Fork:
    """A fork of Infinity.

    Attributes:
      title: the method's name.
      compress: gives a built model the fork's cache: (model, its size, pictures at once).
    """

    title: str
    compress: Callable[[Any, str, int], None]

    def check(self, model: str) -> None:
        """Raise SystemExit if the fork does not serve a known Infinity."""
        if model not in SIZES:
            raise SystemExit(
                f"{self.title}'s code serves {' and '.join(SIZES)}, not {model}: "
                f"leave out its checkout, or compare {model} in a call of its own"
            )

    def apply(self, checkout: Path, model: Any, size: str, batch: int) -> None:
        """Give a built model the fork's cache, from a checkout that Python imports from.

        Args:
          checkout: the fork's folder; its code reads budgets and orders by paths relative to it.
          model: what the fork's own ``Infinity`` made.
          size: a value of ``SIZES``.
          batch: pictures at once.
        """
        with chdir(checkout):
            self.compress(model, size, batch)


def _scalekv(model: Any, size: str, batch: int) -> None:
    """Compress as infer_2b.py and infer_8b.py do."""
    code = importlib.import_module(f"enable_scale_kv_{size}")
    code.enable_scale_kv(model, window_size=16, max_capacity=650, kernel_size=5, pooling="maxpool")


def _heatkv(model: Any, size: str, batch: int) -> None:
    """Drop blocks from memory, with fused attention, as generate_2b_heatkv_comparison.py does."""
    code = importlib.import_module("enable_real_pruning_fast")
    orders = importlib.import_module("tools.utils").orders
    protected = 3
    code.enable_real_pruning_scale_specific_fused_segmented(
        model,
        0.1,
        orders(protected, model_type=size.removesuffix("b")),
        protected_prefix_scales=protected,
        source_scale_start=protected,
        requested_generation_batch_size=batch,
    )


FORKS = {"scalekv": Fork("ScaleKV", _scalekv), "heatkv": Fork("HeatKV", _heatkv)}
"""Name of a method -> the fork that has it."""
