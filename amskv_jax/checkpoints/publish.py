"""Checkpoints for others: a repository of the Hugging Face hub, with statistics and plans.

A repository holds one checkpoint, as ``hub.fetch_checkpoint`` finds it: the files of a folder, or a
packed one as ``model.safetensors``. Beside it lie ``stats/``, ``plans/`` and the model card.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from amskv_jax.checkpoints.address import Address, is_address
from amskv_jax.checkpoints.card import MARK, model_card
from amskv_jax.checkpoints.folder import check_checkpoint
from amskv_jax.checkpoints.hub import (
    CONFIG,
    LIBRARY,
    PACKED,
    fetch_file,
    huggingface_hub,
)
from amskv_jax.checkpoints.hub_errors import explain
from amskv_jax.checkpoints.info import CheckpointInfo, parse_info
from amskv_jax.errors import AmskvError, UsageError
from amskv_jax.plan.retention import RetentionPlan
from amskv_jax.plan.stats import LayerStats

CARD = "README.md"
_PathLike = str | os.PathLike[str]


def push(
    checkpoint: _PathLike,
    repo: str,
    *,
    stats: Iterable[_PathLike] = (),
    plans: Iterable[_PathLike] = (),
    license: str = "",
    private: bool = False,
    endpoint: str | None = None,
) -> Address:
    """Write a checkpoint to a repository of the hub, in one commit.

    A repository that does not exist is made. A checkpoint that is there is replaced, statistics and
    plans of other names stay. The model card is written anew, unless somebody else wrote it.

    Args:
      checkpoint: a folder, or a packed file.
      repo: "user/repository".
      stats: files of layer statistics of this checkpoint.
      plans: retention plans for this model.
      license: the hub's name of the weights' licence, such as "mit", for the model card.
      private: make a repository that only its owners see; one that exists stays what it is.
      endpoint: the server's URL; that of ``HF_ENDPOINT`` if not given.

    Returns:
      The repository's address, with the commit.

    Raises:
      AmskvError: if the checkpoint is damaged, statistics or plans are of another model, or the hub
        refuses; the repository is then what it was.
    """
    address = Address.parse(repo if is_address(repo) else f"hf://{repo}")
    if address.path or address.revision or address.sha256:
        raise UsageError(f"{repo} is more than the name of a repository: expected user/repository")
    info = check_checkpoint(checkpoint)
    files = _files(Path(checkpoint), info)
    new_stats = _named("stats", stats, ".npz")
    new_plans = _named("plans", plans, ".json")
    for file in new_stats.values():
        LayerStats.load(file, info.fingerprint).check(info.model.cache_shape(info.model.schedule))
    for file in new_plans.values():
        plan = RetentionPlan.load(file, info.model.schedule)
        plan.check(info.model.cache_shape(info.model.schedule))
    hub = huggingface_hub(address)
    api = hub.HfApi(endpoint=endpoint, **LIBRARY)
    try:
        api.create_repo(address.repo, private=private or None, exist_ok=True)
        there = set(api.list_repo_files(address.repo))
        stale = _checkpoint_files(there, _stated_files(address, there, endpoint))
        # What a name has is kept, and listed again.
        there -= stale
        files |= new_stats | new_plans
        additions = [hub.CommitOperationAdd(name, str(file)) for name, file in files.items()]
        if CARD not in there or MARK in _text(address, CARD, endpoint):
            card = model_card(
                address.repo,
                info,
                packed=PACKED in files,
                stats=sorted(new_stats.keys() | _below(there, "stats/", ".npz")),
                plans=sorted(new_plans.keys() | _below(there, "plans/", ".json")),
                license=license,
            )
            additions.append(hub.CommitOperationAdd(CARD, card.encode()))
        deletions = [hub.CommitOperationDelete(name) for name in sorted(stale - files.keys())]
        commit = api.create_commit(
            address.repo,
            [*deletions, *additions],
            commit_message=f"{info.kind} checkpoint, fingerprint {info.fingerprint}",
        )
    except Exception as error:  # see ``hub._asking``
        raise explain(error, address, endpoint, pushing=True) from error
    return Address(address.repo, revision=commit.oid)


def _files(checkpoint: Path, info: CheckpointInfo) -> dict[str, Path]:
    """Return the files of a checkpoint by their paths in the repository."""
    if checkpoint.is_file():
        return {PACKED: checkpoint}
    paths = [checkpoint / CONFIG, *(checkpoint / "params").rglob("*")]
    paths += [checkpoint / name for name in info.files]
    return {
        path.relative_to(checkpoint).as_posix(): path for path in sorted(paths) if path.is_file()
    }


def _named(folder: str, files: Iterable[_PathLike], suffix: str) -> dict[str, Path]:
    """Return files by their paths in the repository."""
    named: dict[str, Path] = {}
    for file in map(Path, files):
        name = f"{folder}/{file.name}"
        if file.suffix != suffix or not re.fullmatch(r"\w[\w.+-]*", file.name):
            raise UsageError(
                f"{file} cannot be pushed to {folder}/: expected a name of letters, digits, "
                f"_ . + - that ends in {suffix}"
            )
        if name in named:
            raise UsageError(f"{named[name]} and {file} have the same name: rename one of them")
        named[name] = file
    return named


def _checkpoint_files(names: Iterable[str], files: Sequence[str]) -> set[str]:
    """Return which files of a repository are its checkpoint."""
    own = {CONFIG, PACKED, *files}
    return {name for name in names if name in own or name.startswith("params/")}


def _stated_files(address: Address, there: set[str], endpoint: str | None) -> list[str]:
    """Return the small files which the checkpoint in a repository names.

    Raises:
      AmskvError: if the repository is another program's: nothing of it is to be replaced.
    """
    if CONFIG not in there:
        return []
    try:
        content = parse_info(_text(address, CONFIG, endpoint), f"{address}/{CONFIG}")
    except AmskvError as error:
        raise AmskvError(f"{error}. Push to another repository, or clear this one") from error
    return [name for name in content.get("files", ()) if isinstance(name, str)]


def _text(address: Address, name: str, endpoint: str | None) -> str:
    path = fetch_file(address.inside(name), endpoint=endpoint).path
    return path.read_text(encoding="utf-8", errors="replace")


def _below(names: Iterable[str], start: str, end: str) -> set[str]:
    return {name for name in names if name.startswith(start) and name.endswith(end)}
