"""What layers that choose tokens at run time should keep: dense attention, explicit loops.

Every function returns, per step, batch row and head, the ascending positions which are read.
"""

import math

import numpy as np

from amskv_jax.testing import read_mask


def scalekv_positions(record, schedule, counts, *, window, kernel, scale, mode):
    """ScaleKV. Equal scores, which pooling makes frequent, leave the earlier tokens."""

    def choose(keep, at_hand, query, keys, grid, memory):
        observing = observing_tokens(grid, window)
        own = len(at_hand) - len(query)
        scores = np.zeros(len(at_hand))
        for token in observing:
            products = np.array([float(query[token] @ keys[position]) for position in at_hand])
            if mode == "paper":
                scores += softmax(scale * products)
            else:
                scores += products / math.sqrt(query.shape[-1])
        inside = {own + token for token in observing}
        pooled = {}
        for index in set(range(len(at_hand))) - inside:
            near = range(max(0, index - kernel // 2), min(len(at_hand), index + kernel // 2 + 1))
            pooled[index] = max(scores[other] for other in near if other not in inside)
        ranking = sorted(pooled, key=lambda index: (-pooled[index], index))
        chosen = sorted([*inside, *ranking[: keep - window]])
        return [at_hand[index] for index in chosen]

    return _positions(record, schedule, counts, choose)


def h2o_positions(record, schedule, counts, *, recent, scale):
    """H2O: the latest tokens, and those with most attention since they came; ties: the earlier."""

    def choose(keep, at_hand, query, keys, grid, memory):
        for position in at_hand:
            memory.setdefault(position, 0.0)
        for token in range(len(query)):
            products = np.array([float(query[token] @ keys[position]) for position in at_hand])
            for position, probability in zip(at_hand, softmax(scale * products), strict=True):
                memory[position] += probability
        if keep == len(at_hand):
            return at_hand
        latest = at_hand[len(at_hand) - recent :]
        others = at_hand[: len(at_hand) - recent]
        others = sorted(others, key=lambda position: (-memory[position], position))
        return sorted([*others[: keep - recent], *latest])

    return _positions(record, schedule, counts, choose, always=True)


def observing_tokens(grid, window):
    """The tokens at the centres of the patches into which a map is cut, row by row."""
    side = math.isqrt(window)
    height, width = grid[0] // side, grid[1] // side
    return [
        (row * height + (height - 1) // 2) * grid[1] + column * width + (width - 1) // 2
        for row in range(side)
        for column in range(side)
    ]


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _positions(record, schedule, counts, choose, always=False):
    rows, _, heads, _ = record.query[0].shape
    keys = np.concatenate(record.key, axis=1).astype(np.float64)
    found = [[[[] for _ in range(heads)] for _ in range(rows)]]
    memories = [[{} for _ in range(heads)] for _ in range(rows)]
    for step in range(schedule.num_scales - 1):
        found.append([])
        for row in range(rows):
            found[-1].append([])
            for head in range(heads):
                at_hand = found[step][row][head] + list(
                    range(schedule.offsets[step], schedule.offsets[step + 1])
                )
                if counts[step + 1] == 0:
                    at_hand = []
                elif always or counts[step + 1] < len(at_hand):
                    query = record.query[step][row, :, head].astype(np.float64)
                    at_hand = choose(
                        counts[step + 1],
                        at_hand,
                        query,
                        keys[row, :, head],
                        schedule.grids[step],
                        memories[row][head],
                    )
                found[-1][row].append(at_hand)
    return found


def assert_reads(row, schedule, record, expected):
    """Check that a layer read exactly the ``expected`` positions, at every step."""
    for step, rows in enumerate(expected):
        mask = read_mask(row, schedule, record, step)
        for batch_row, heads in enumerate(rows):
            for head, positions in enumerate(heads):
                np.testing.assert_array_equal(
                    np.flatnonzero(mask[batch_row, head]), positions, err_msg=f"step {step}"
                )
