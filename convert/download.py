"""Sources of a conversion which lie on the Hugging Face hub."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from amskv_jax.checkpoints.address import Address, is_address
from amskv_jax.checkpoints.hub import Fetched, fetch_file, fetch_first, verify
from amskv_jax.convert.read import SUFFIXES, WEIGHTS, shard_names
from amskv_jax.errors import AmskvError

Report = Callable[[str], None]
"""Told what a user should know, a line of text."""


def fetch_source(
    source: str | os.PathLike[str], beside: Sequence[str] = (), report: Report | None = None
) -> Path:
    """Return the file or folder of a source, which is downloaded if it lies on the hub.

    Of a folder only the weights are downloaded, in the format that ``read.read_state_dict`` would
    take, with config.json and what is needed beside them.

    Args:
      source: an address, see ``checkpoints.address.Address``; anything else is a path, and stays
        what it is.
      beside: names of small files that are needed beside the weights.
      report: told which files have no checksum in their address, and which one they have.

    Raises:
      AmskvError: if a file cannot be had, or has another checksum than its address says.
    """
    if not is_address(source):
        return Path(source)
    address = Address.parse(source)
    if address.path.endswith(SUFFIXES):
        weights = [fetch_file(address)]
        place = weights[0].path
    else:
        weights = _fetch_weights(address)
        place = weights[0].path.parent
        folder = replace(address, revision=weights[0].address.revision)
        fetch_first(folder, ["config.json"])
        for name in beside:
            fetch_file(folder.inside(name))
    for fetched in weights:
        _check(fetched, report)
    return place


def _fetch_weights(folder: Address) -> list[Fetched]:
    """Download the weights in a folder."""
    names = [name for weights in WEIGHTS for name in (f"{weights}.index.json", weights)]
    first = fetch_first(folder, names)
    if first is None:
        raise AmskvError(
            f"{folder} holds no weights under the names {' or '.join(WEIGHTS)}: give the address "
            "of their file"
        )
    if not first.path.name.endswith(".index.json"):
        return [first]
    # Of the same commit as the index, whatever is pushed meanwhile.
    folder = replace(folder, revision=first.address.revision)
    return [fetch_file(folder.inside(name)) for name in shard_names(first.path)]


def _check(fetched: Fetched, report: Report | None) -> None:
    """Compare a file with its checksum; without one, say which it has."""
    if fetched.address.sha256 or report:
        found = verify(fetched)
        if report and not fetched.address.sha256:
            pinned = replace(fetched.address, sha256=found)
            report(f"unchecked, as no checksum is known; to have it checked, give {pinned}")
