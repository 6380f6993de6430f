"""What goes wrong between huggingface_hub and the hub, in this package's words."""

import errno
from dataclasses import dataclass

from amskv_jax.checkpoints.address import Address
from amskv_jax.errors import AmskvError


class MissingError(AmskvError):
    """The repository has no such file."""


class UnreachableError(AmskvError):
    """The file is not in the cache, and there is no way to the hub."""


@dataclass(frozen=True)
class _Meaning:
    """What an error is to a user: its text, and its class where callers tell it from others."""

    message: str
    error: type[AmskvError] = AmskvError


_UNREACHABLE = _Meaning(
    "{address} is not in the cache {cache}, and {hub} cannot be reached: look at your connection, "
    "or copy the cache from a machine that has it ({reason})",
    UnreachableError,
)
_OFFLINE = _Meaning(
    "{hub} is not to be asked for {address}, as HF_HUB_OFFLINE is set, and the cache {cache} does "
    "not have it: unset HF_HUB_OFFLINE, or copy the cache from a machine that has it",
    UnreachableError,
)
_FORBIDDEN = _Meaning("{hub} does not let you {use} {repo}: {login} to a token that may")
_DISK_FULL = _Meaning(
    "the disk is too full for {address}: free some of it, or set HF_HOME, now that of the cache "
    "{cache}, to a folder on another"
)
_FAILED = _Meaning("{hub} failed while it was to {use} {address}: {reason}. Try again later")
_MEANINGS = {
    "LocalEntryNotFoundError": _UNREACHABLE,
    "OfflineModeIsEnabled": _UNREACHABLE,
    "GatedRepoError": _Meaning(
        "{hub} lets only those read {repo} whom its owners allow to: ask for access at {url}, then "
        "{login}"
    ),
    "RepositoryNotFoundError": _Meaning(
        "{hub} has no repository {repo}, or it is private: look at the name; if it is private, "
        "{login}"
    ),
    "RevisionNotFoundError": _Meaning(
        "{repo} has no revision {revision} on {hub}: expected a branch, a tag or a commit"
    ),
    "EntryNotFoundError": _Meaning(
        "{repo} has no {path} in its revision {revision} on {hub}: see its files at "
        "{url}/tree/{revision}",
        MissingError,
    ),
}
"""Errors of huggingface_hub by name: the first that fits counts, as some are kinds of others."""


def explain(
    error: Exception, address: Address, endpoint: str | None = None, *, pushing: bool = False
) -> AmskvError:
    """Return what an error of huggingface_hub means, and what to do.

    Args:
      error: what it raised.
      address: what was asked for.
      endpoint: of which server; that of ``HF_ENDPOINT`` if not given.
      pushing: whether something was to be written there.
    """
    from huggingface_hub import constants, errors  # noqa: PLC0415

    if isinstance(error, AmskvError):
        return error
    names = [name for name in _MEANINGS if isinstance(error, getattr(errors, name, ()))]
    status = getattr(getattr(error, "response", None), "status_code", None)
    meaning = _MEANINGS[names[0]] if names else _FAILED
    if status in (401, 403) and (pushing or not names):
        meaning = _FORBIDDEN
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        meaning = _DISK_FULL
    elif meaning is _UNREACHABLE and constants.HF_HUB_OFFLINE:
        meaning = _OFFLINE
    message = meaning.message.format(
        address=address,
        repo=address.repo,
        path=address.path,
        revision=address.revision or "main",
        use="write to" if pushing else "read",
        hub=f"the hub ({endpoint or constants.ENDPOINT})",
        url=f"{endpoint or constants.ENDPOINT}/{address.repo}",
        cache=constants.HF_HUB_CACHE,
        reason=_reason(error.__cause__ or error),
        login="log in with `hf auth login`, or set HF_TOKEN",
    )
    return meaning.error(message)


def _reason(error: BaseException) -> str:
    """Return the first line of an error's message that says something."""
    lines = [line.strip().rstrip(".:") for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__)
