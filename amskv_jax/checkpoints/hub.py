"""Files of the Hugging Face hub, by addresses such as ``hf://FoundationVision/var/var_d30.pth``.

The work is done by huggingface_hub (the extra "hub"): a file is downloaded once, into its cache
(``HF_HOME``), with its token (``HF_TOKEN``), a connection that is cut is taken up again, and with
``HF_HUB_OFFLINE=1`` only the cache is read. ``HF_ENDPOINT`` names another server.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from amskv_jax.checkpoints.address import FORM, Address, is_address
from amskv_jax.checkpoints.hub_errors import MissingError, UnreachableError, explain
from amskv_jax.errors import AmskvError, UsageError

LIBRARY = {"library_name": "amskv-jax", "library_version": version("amskv-jax")}
"""Who asks, for the hub's statistics."""
CONFIG = "config.json"
PACKED = "model.safetensors"
"""What a packed checkpoint is called in a repository."""


@dataclass(frozen=True)
class Fetched:
    """A file of the hub that is on this machine.

    Attributes:
      address: with the commit from which it is, and the checksum that it should have, if known.
      path: in the cache of huggingface_hub.
    """

    address: Address
    path: Path


def fetch(source: str | os.PathLike[str], *, endpoint: str | None = None) -> Path:
    """Return the path of a file, which is downloaded if it lies on the hub.

    Args:
      source: an address; anything else is a path, and stays what it is.
      endpoint: the server's URL; that of ``HF_ENDPOINT`` if not given.

    Raises:
      AmskvError: if it cannot be had, see ``fetch_file``, or has not the address' checksum.
    """
    if not is_address(source):
        return Path(source)
    fetched = fetch_file(Address.parse(source), endpoint=endpoint)
    if fetched.address.sha256:
        verify(fetched)
    return fetched.path


def fetch_file(address: Address, *, endpoint: str | None = None, cached: bool = False) -> Fetched:
    """Download a file, unless it is in the cache; its checksum is not looked at.

    Args:
      address: of the file.
      endpoint: the server's URL; that of ``HF_ENDPOINT`` if not given.
      cached: look into the cache alone.

    Raises:
      UsageError: if the address is that of a repository.
      AmskvError: if there is no such file, revision or repository, the hub cannot be reached, or
        huggingface_hub is not installed.
    """
    if not address.path:
        raise UsageError(f"{address} is a repository, expected a file in it: {FORM}")
    with _asking(address, endpoint) as hub:
        path = hub.hf_hub_download(
            address.repo,
            address.path,
            revision=address.revision or None,
            endpoint=endpoint,
            **LIBRARY,
            local_files_only=cached,
        )
    # The cache has a folder for every commit, with the files as they lie in the repository.
    commit = Path(path).parents[address.path.count("/")].name
    return Fetched(replace(address, revision=commit), Path(path))


def fetch_first(
    folder: Address, names: Sequence[str], *, endpoint: str | None = None
) -> Fetched | None:
    """Download the first of several files that is there; None if none of them is.

    Raises:
      AmskvError: as ``fetch_file`` does.
    """
    unreachable: UnreachableError | None = None
    for name in names:
        try:
            # Waiting for the hub once is enough.
            return fetch_file(
                folder.inside(name), endpoint=endpoint, cached=unreachable is not None
            )
        except MissingError:
            continue
        except UnreachableError as error:
            unreachable = unreachable or error
    if unreachable is not None:
        raise unreachable
    return None


def fetch_folder(address: Address, patterns: Sequence[str], *, endpoint: str | None = None) -> Path:
    """Download the files of a folder whose paths in it match one of the patterns.

    Args:
      address: of the folder.
      patterns: names with ``*``, which stands for slashes too.
      endpoint: the server's URL; that of ``HF_ENDPOINT`` if not given.

    Raises:
      AmskvError: as ``fetch_file`` does.
    """
    with _asking(address, endpoint) as hub:
        folder = hub.snapshot_download(
            address.repo,
            revision=address.revision or None,
            endpoint=endpoint,
            **LIBRARY,
            allow_patterns=[address.inside(pattern).path for pattern in patterns],
        )
    return Path(folder) / address.path


def fetch_checkpoint(address: Address, *, endpoint: str | None = None) -> Path:
    """Download a checkpoint of this package, see ``publish.push``; what lies beside it is not.

    Args:
      address: of a repository or a folder in it, or of a packed checkpoint.
      endpoint: the server's URL; that of ``HF_ENDPOINT`` if not given.

    Returns:
      Its folder, or the packed file.

    Raises:
      AmskvError: if there is none, or as ``fetch_file`` does.
    """
    if address.path.endswith(".safetensors"):
        return fetch(str(address), endpoint=endpoint)
    found = fetch_first(address, (CONFIG, PACKED), endpoint=endpoint)
    if found is None:
        raise AmskvError(
            f"{address} holds no checkpoint: expected {CONFIG} and params, or {PACKED}, as "
            "`amskv push` writes them"
        )
    if found.path.name == PACKED:
        return found.path
    from amskv_jax.checkpoints.info import parse_info  # noqa: PLC0415 (imports JAX)

    # Looked at first, so that not the whole of another program's repository is downloaded.
    content = parse_info(found.path.read_text(encoding="utf-8", errors="replace"), str(address))
    files = [name for name in content.get("files", ()) if isinstance(name, str)]
    # Of the same commit, should somebody push meanwhile.
    folder = replace(address, revision=found.address.revision)
    return fetch_folder(folder, [CONFIG, "params/*", *files], endpoint=endpoint)


def fetch_stats(address: Address, *, endpoint: str | None = None) -> Path:
    """Download layer statistics: a file, or those that lie beside a checkpoint.

    Raises:
      AmskvError: if there are none or several, or as ``fetch_file`` does.
    """
    if address.path.endswith(".npz"):
        return fetch(str(address), endpoint=endpoint)
    files = sorted(fetch_folder(address, ["stats/*.npz"], endpoint=endpoint).glob("stats/*.npz"))
    if len(files) != 1:
        names = ", ".join(str(address.inside(f"stats/{file.name}")) for file in files)
        raise AmskvError(
            f"{address} holds several statistics: give one of {names}"
            if files
            else f"{address} holds no statistics in stats/: push them with `amskv push --stats`"
        )
    return files[0]


def verify(fetched: Fetched) -> str:
    """Return a file's SHA-256, compared with the one that its address or the hub says.

    Raises:
      AmskvError: if it is another one.
    """
    blob = fetched.path.resolve()
    with blob.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    stated = blob.name if re.fullmatch("[0-9a-f]{64}", blob.name) else ""  # by git-lfs, on the hub
    for expected, by in ((stated, "the hub says"), (fetched.address.sha256, "is expected")):
        if expected and found != expected:
            raise AmskvError(
                f"{replace(fetched.address, sha256='')} has the SHA-256 {found}, but {expected} "
                f"{by}: the download is damaged, or the published file was replaced. Remove {blob} "
                "and download it again. If it has the same checksum then, it is another file than "
                "the one that was tested; to take it all the same, give its address with that "
                f"checksum: {replace(fetched.address, sha256=found)}"
            )
    return found


def huggingface_hub(needed_by: object) -> ModuleType:
    """Return the package; what needs it is named if it is not there.

    Raises:
      AmskvError: if it is not installed.
    """
    try:
        import huggingface_hub  # noqa: PLC0415
    except ImportError as error:
        raise AmskvError(
            f'{needed_by} needs the package huggingface_hub: install the extra "hub", '
            'pip install "amskv-jax[hub]"'
        ) from error
    return huggingface_hub


@contextmanager
def _asking(address: Address, endpoint: str | None) -> Iterator[Any]:
    """Yield huggingface_hub, and say in this package's words what goes wrong there."""
    hub = huggingface_hub(address)
    try:
        yield hub
    # Besides its own errors it lets those of the HTTP library through, which changes with its
    # version.
    except Exception as error:
        raise explain(error, address, endpoint) from error
