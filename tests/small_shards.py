"""Bulk drawing of pictures that tell their number; imports no JAX, so that processes can fork."""

from dataclasses import dataclass

import numpy as np

from amskv_jax.bulk.files import ShardFiles
from amskv_jax.bulk.shards import draw_shards


@dataclass
class Batch:
    """What a drawer yields, with pictures that tell their number."""

    first: int
    count: int

    def pictures(self):
        numbers = np.arange(self.first, self.first + self.count)
        return np.broadcast_to(numbers[:, None, None, None], (self.count, 4, 6, 3)).astype(np.uint8)

    def tokens(self):
        return np.arange(self.first, self.first + self.count, dtype=np.int32)[:, None] + np.arange(
            5
        )


@dataclass(frozen=True)
class Settings:
    seed: int = 0


BATCH = 4


def classes(numbers):
    return (numbers % 3).astype(np.int32)


class Run:
    """A run in a folder, which counts what it draws."""

    def __init__(self, folder, png=False, num=29, **options):
        path = folder / ("labels.npz" if png else "pictures.npz")
        self.files = ShardFiles(path, num, (4, 6), 5, tokens=True, png=png)
        self.options = {"settings": Settings(), **options}
        self.drawn, self.told = [], []

    def batches(self, first, count):
        assert first % BATCH == 0
        for start in range(first, first + count, BATCH):
            self.drawn.append(start)
            yield Batch(start, min(BATCH, first + count - start))

    def __call__(self, **options):
        return draw_shards(
            self.files,
            self.batches,
            batch=BATCH,
            classes=classes,
            tell=self.told.append,
            **self.options,
            **options,
        )


def contents(folder):
    """The bytes of every file but locks."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".lock")
    }
